"""A model in Hugging Face layout, whole or not at all.

Takes:  weights one by one (never all at once in memory beside a shard), config, tokenizer, generation config.
Gives:  a folder that transformers and vLLM load as it is; `atomic_folder` and `write_synced` for anything that must
        appear whole; `why_unwritten`, one line of an error.
Knows:  the sharded layout: model-00001-of-00003.safetensors and its index.
Never:  leaves a half-written folder under the final name, or pickles.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from flux_ray.hugging_face import Tokenizer

MAX_SHARD_BYTES = 4 * 2**30  # of one weights file: what hubs and loaders are used to
#: What writing raises where the disk is full, read-only or gone.
UNWRITTEN = (OSError, SafetensorError)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name (and its place) when the block ends well."""
    final = Path(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        replaced = final.with_name(f".{final.name}.replaced-{os.getpid()}")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """On disk when this returns. Some network file systems sync files but no folders: they answer EINVAL."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_synced(file: Path, text: str) -> None:
    """The file has this text, on disk, when this returns. Whatever happens meanwhile, it is whole or as it was."""
    temporary = file.with_name(f".{file.name}.writing-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync(file.parent)


def why_unwritten(error: BaseException) -> str:
    """One of `UNWRITTEN` as a person reads it."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())


def save_model(
    folder: str | Path, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, hf_config: PretrainedConfig,
    tokenizer: Tokenizer | None, generation_config: GenerationConfig | None,
) -> None:
    """Write the model. `weights` go by their checkpoint names; a tied head is left out by whoever gives them."""
    items = weights.items() if isinstance(weights, Mapping) else weights
    with atomic_folder(folder) as temporary:
        write_shards(temporary, items)
        hf_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if generation_config is not None:
            # As a file, without transformers' validation: a model's own odd settings are kept as they came.
            generation_config.to_json_file(temporary / "generation_config.json")


def write_shards(folder: Path, items: Iterable[tuple[str, Tensor]]) -> None:
    """Weights into files of at most MAX_SHARD_BYTES (a tensor may be larger); an index where there are several."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total_bytes = pending_bytes = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in items:
        if pending and pending_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
            pending_bytes = 0
        # A copy: the giver may reuse its memory for the next tensor, and a view would drag its whole storage along.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
