"""Updates that were left out, because a number in them was not finite: which number it was, and the batch on disk.

Takes:  micro-batches, the model's output on them; the scores of their groups.
Gives:  `not_finite` (the name of the number), Skipped, `keep` (the batch as safetensors, a JSON beside it); `read`,
        which gives its sequences.
Knows:  each rank writes its own share; rank 0 writes the JSON, which the driver reads.
Never:  ends a run because a batch can't be written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ray.batch import MicroBatch, make_micro_batch
from flux_ray.records import Sample, ScoredGroup

#: Name in the file ► the field of a micro-batch.
KEPT = {"token_ids": "token_ids_S", "loss_mask": "loss_mask_S", "loss_weights": "loss_weights_S",
        "advantages": "advantages_S", "sampler_logprobs": "sampler_logprobs_S",
        "reference_logprobs": "reference_logprobs_S", "lengths": "lengths_B", "samples": "sample_ids_B"}


@dataclass(frozen=True)
class Skipped:
    """An update that was left out. `why`: what was not finite, and where; the micro-batches are this rank's."""

    update: int
    why: str
    micro_batches: Sequence[MicroBatch]

    def tensors(self) -> dict[str, Tensor]:
        """Sequences side by side, as micro-batches hold them; `lengths` divides them."""
        named = {name: [getattr(m, field) for m in self.micro_batches] for name, field in KEPT.items()}
        return {name: torch.cat(parts).cpu().contiguous() for name, parts in named.items()
                if parts and all(part is not None for part in parts)}


@dataclass(frozen=True)
class KeptSequence:
    """A sequence of a batch that was left out."""

    place: int  # among the rank's samples of the update
    values: dict[str, Tensor]  # (T,) each, by the names of a Sample

    @property
    def micro_batch(self) -> MicroBatch:
        """Of it alone."""
        sample = Sample(**{name: values.numpy() for name, values in self.values.items()})
        return make_micro_batch([sample], sample_ids=[self.place])


def not_finite(micro_batch: MicroBatch, given: Sequence[Tensor | None], *, output: str) -> str:
    """What is to blame for a loss that isn't finite: what went into it, else the model's output, else itself."""
    inputs = [("the sampler's log-probs", micro_batch.sampler_logprobs_S),
              ("the reference's log-probs", micro_batch.reference_logprobs_S),
              ("the advantages", micro_batch.advantages_S), ("the weights of the loss", micro_batch.loss_weights_S)]
    outputs = zip((f"the model's {output}", "the entropy"), given, strict=False)
    return next((name for name, values in [*inputs, *outputs]
                 if values is not None and not bool(torch.isfinite(values).all())), "the loss")


def keep(
    folder: Path, skipped: Sequence[Skipped], *, step: int, name: str, rank: int, scores: Sequence[ScoredGroup],
) -> None:
    """Write this rank's share of a step's batch. `name`: of what is trained; `scores`: of the rank's groups, if any."""
    stem = f"step-{step:06d}-{name}"
    # By place, as the JSON has them: an update that is left out leaves its number to the next one.
    tensors = {f"{i}.{key}": tensor for i, one in enumerate(skipped) for key, tensor in one.tensors().items()}
    if scores:
        tensors["rewards"] = torch.from_numpy(np.concatenate([np.asarray(group.rewards) for group in scores]))
        tensors["group_sizes"] = torch.tensor([len(group.rewards) for group in scores])
        tensors["group_uids"] = torch.tensor([group.uid for group in scores])
    try:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / f"{stem}-rank-{rank}.safetensors")
        if rank == 0:
            told = {"step": step, "skipped": [{"update": one.update, "why": one.why} for one in skipped]}
            (folder / f"{stem}.json").write_text(json.dumps(told), encoding="utf-8")
    except OSError as error:
        logging.getLogger(__name__).warning("the batch of step %d could not be kept: %s", step, error)


def read(file: Path, number: int) -> list[KeptSequence]:
    """A rank's share of one of the updates that the step left out, from 0; it may be empty."""
    stored = load_file(file)
    of_update = {name: stored[f"{number}.{name}"] for name in KEPT if f"{number}.{name}" in stored}
    if not of_update:
        return []
    lengths, places = of_update.pop("lengths").tolist(), of_update.pop("samples").tolist()
    rows = {name: values.split(lengths) for name, values in of_update.items()}
    return [KeptSequence(place, {name: of[i] for name, of in rows.items()}) for i, place in enumerate(places)]
