"""The training engine on disk: everything that the next update depends on, independent of ranks and ZeRO stage.

Takes:  an engine, a folder.
Gives:  per trained parameter its fp32 master and AdamW's two moments, whole (safetensors); random states; a JSON.
Knows:  where each ZeRO stage keeps them; that moments don't exist before the first update.
Never:  pickles; leaves a half-written folder; writes or takes a value that isn't finite; holds more than one
        gathered parameter beside a shard, unless memory allows a snapshot that is written beside the next step.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ray.errors import UserError
from flux_ray.model.finite import not_finite
from flux_ray.model.save import UNWRITTEN, atomic_folder, write_shards
from flux_ray.train import full_weights
from flux_ray.train.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE, RANDOM = "state.json", "random.safetensors"
FORMAT = 2  # of the folder; a later one may read this
BYTES_OF_PARAMETER = 4 * (1 + len(MOMENTS))
#: Where the kernel says what a container may have, and what it has taken (cgroup 2).
CGROUP = Path("/sys/fs/cgroup")


def save(engine: Engine, folder: str | Path, *, step: int, kl_coef: float, background: str = "never") -> Future[None]:
    """Rank 0 writes; all ranks call. The folder appears whole or not at all.

    Gives what is done once it is there, at once on the other ranks. It ends in one of UNWRITTEN where the folder can't
    be written: the ranks have then gathered everything all the same, and are still in step. `background`: auto |
    always | never, whether rank 0 writes a snapshot in a thread; the engine may go on as soon as this returns.
    Raises RuntimeError where a tensor isn't finite: a moment, say.
    """
    random_states, tensors = _gathered_random_states(engine), _finite(_tensors(engine))
    state = {"format": FORMAT, "version": step, "num_updates": engine.num_updates, "kl_coef": kl_coef,
             "lora_alpha": _lora_alpha(engine), "dtype": _dtype(engine)}
    done: Future[None] = Future()
    if engine.rank > 0:
        done.set_result(None)
    elif background == "always" or (background == "auto" and _has_room(engine)):
        snapshot = [(name, tensor.to("cpu", copy=True)) for name, tensor in tensors]
        threading.Thread(target=_write, args=(done, Path(folder), snapshot, random_states, state)).start()
    else:
        _write(done, Path(folder), tensors, random_states, state)
    for _ in tensors:   # gathering is collective: where rank 0 broke off, the others still wait for it
        pass
    dist.barrier()
    return done


def _write(
    done: Future[None], folder: Path, tensors: Iterable[tuple[str, Tensor]], random_states: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    try:
        with atomic_folder(folder) as temporary:
            write_shards(temporary, tensors)
            save_file(random_states, temporary / RANDOM)
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    except BaseException as error:
        done.set_exception(error)
        if not isinstance(error, UNWRITTEN):
            raise
    else:
        done.set_result(None)


def _has_room(engine: Engine) -> bool:
    """Whether a snapshot takes no more than half of the memory that is free."""
    num_parameters = sum(full_weights.whole_shape(p).numel() for _, p in full_weights.parameters(engine.model))
    return _free_bytes() >= 2 * BYTES_OF_PARAMETER * num_parameters


def _free_bytes() -> int:
    """Of this machine, or of the container that this process is in."""
    free = psutil.virtual_memory().available
    try:
        most, taken = ((CGROUP / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - int(taken))


def load(engine: Engine, folder: str | Path) -> tuple[int, float]:
    """Put the engine back where `save` found it; (step, kl_coef). Every rank reads the folder.

    Raises UserError where there is no checkpoint, one of another model, or one that can't be read.
    """
    try:
        return _load(engine, Path(folder))
    except (SafetensorError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"checkpoint {str(folder)!r} can't be read: {' '.join(str(error).split())}") from error


def _load(engine: Engine, folder: Path) -> tuple[int, float]:
    if not (folder / STATE).is_file():
        raise UserError(f"checkpoint {str(folder)!r}: no {STATE} in it")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise UserError(f"checkpoint {str(folder)!r}: format {state['format']}, this version reads {FORMAT}")
    if state.get("lora_alpha") != _lora_alpha(engine):
        raise UserError(f"checkpoint {str(folder)!r} is of another model: train.lora.alpha was "
                        f"{state.get('lora_alpha')}, is {_lora_alpha(engine)} (None: no LoRA)")
    engine.num_updates = state["num_updates"]
    _prepare_moments(engine)
    stored = _stored_tensors(folder)
    _refuse_unknown(stored, engine, folder)
    for name, parameter in full_weights.parameters(engine.model):
        parts = {}
        for kind in ("master", *MOMENTS):
            key = f"{kind}.{name}"
            if key not in stored:
                raise UserError(f"checkpoint {str(folder)!r} is of another model: it lacks {key}")
            with safe_open(stored[key], framework="pt") as file:
                parts[kind] = file.get_tensor(key).to(engine.device)
            if not_finite([parts[kind]]):
                raise UserError(f"checkpoint {str(folder)!r}: {key} has values that are not finite")
        shape = full_weights.whole_shape(parameter)
        if parts["master"].shape != shape:
            raise UserError(f"checkpoint {str(folder)!r} is of another model: {name} has shape "
                            f"{tuple(parts['master'].shape)} there, {tuple(shape)} here")
        _put(engine, parameter, parts)
    for state_of_part in engine.deepspeed.basic_optimizer.state.values():
        state_of_part["step"].fill_(engine.num_updates)
    _set_random_states(engine, load_file(folder / RANDOM))
    dist.barrier()
    return int(state["version"]), float(state["kl_coef"])


def _refuse_unknown(stored: Iterable[str], engine: Engine, folder: Path) -> None:
    """UserError for a trained weight that would be left behind: fewer layers have an adapter now, say."""
    known = {f"master.{name}" for name, _ in full_weights.parameters(engine.model)}
    left = sorted(key for key in stored if key.startswith("master.") and key not in known)
    if left:
        raise UserError(f"checkpoint {str(folder)!r} is of another model: it has {left[0]}"
                        f"{f' and {len(left) - 1} more' if len(left) > 1 else ''}, which nothing here takes")


def _lora_alpha(engine: Engine) -> float | None:
    """What the factors' product is scaled by, beside their rank, which their shapes tell; None without LoRA."""
    return engine.config.lora.alpha if engine.model.adapter else None


def _dtype(engine: Engine) -> str:
    """What the model computes in, beside its fp32 masters: a model that is exported is of this type."""
    return str(engine.model.original_config.dtype).removeprefix("torch.")


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """("master.NAME" | "exp_avg.NAME" | "exp_avg_sq.NAME", whole fp32 tensor). Collective."""
    _prepare_moments(engine)
    for name, parameter in full_weights.parameters(engine.model):
        for kind in ("master", *MOMENTS):
            yield f"{kind}.{name}", _whole_state(engine, parameter, kind)


def _finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        if not_finite([tensor]):
            raise RuntimeError(f"{name} has values that are not finite: no checkpoint is written")
        yield name, tensor


def _whole_state(engine: Engine, parameter: Any, kind: str) -> Tensor:
    if engine.zero_stage == 0:
        tensor = parameter if kind == "master" else engine.deepspeed.basic_optimizer.state[parameter][kind]
        return tensor.detach()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == "master":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _put(engine: Engine, parameter: Any, parts: dict[str, Tensor]) -> None:
    """Both copies of a parameter (the one that computes, the fp32 one that AdamW moves) and its moments."""
    if engine.zero_stage == 0:
        parameter.data.copy_(parts["master"])
        for kind in MOMENTS:
            engine.deepspeed.basic_optimizer.state[parameter][kind].copy_(parts[kind])
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if engine.zero_stage == 3:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(parts["master"])
    else:
        parameter.data.copy_(parts["master"])
    safe_set_full_fp32_param(parameter, parts["master"])
    for kind in MOMENTS:
        safe_set_full_optimizer_state(parameter, parts[kind], kind)


def _prepare_moments(engine: Engine) -> None:
    """AdamW's state as its own first step would make it, where there is none yet; ZeRO told where it lies."""
    wrapper, optimizer = engine.deepspeed.optimizer, engine.deepspeed.basic_optimizer
    for part in _optimized_parts(engine):
        if not optimizer.state[part]:
            optimizer.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                **{kind: torch.zeros_like(part) for kind in MOMENTS},
            }
    if engine.zero_stage in (1, 2):
        wrapper._lazy_init_hp_params_optimizer_state()  # what its first step does: fragments of moments per parameter


def _optimized_parts(engine: Engine) -> list[Tensor]:
    """The tensors that AdamW moves on this rank: flat fp32 partitions under ZeRO, the parameters themselves without."""
    if engine.zero_stage == 0:
        return [parameter for _, parameter in full_weights.parameters(engine.model)]
    if engine.zero_stage == 3:
        return engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    return [part for group in engine.deepspeed.basic_optimizer.param_groups for part in group["params"]]


def _gathered_random_states(engine: Engine) -> dict[str, Tensor]:
    mine = {"cpu": torch.get_rng_state()}
    if engine.device.startswith("cuda"):
        mine["cuda"] = torch.cuda.get_rng_state(engine.device)
    everyone, _ = engine.everyone(mine)
    return {f"{kind}.{rank}": state for rank, states in enumerate(everyone) for kind, state in states.items()}


def _set_random_states(engine: Engine, states: dict[str, Tensor]) -> None:
    """This rank's states; with more ranks than were saved, a new one keeps its own seed."""
    if f"cpu.{engine.rank}" in states:
        torch.set_rng_state(states[f"cpu.{engine.rank}"])
    if engine.device.startswith("cuda") and f"cuda.{engine.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{engine.rank}"], engine.device)


def _stored_tensors(folder: Path) -> dict[str, Path]:
    """Name ► file of every tensor in the folder."""
    stored = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            stored.update(dict.fromkeys(opened.keys(), file))
    return stored
