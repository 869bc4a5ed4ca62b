"""Low-rank adapters (LoRA, arXiv 2106.09685): W stays as loaded, a layer computes with W + (alpha/rank)·B·A.

Takes:  a PolicyModel or a ScoreModel as it was loaded, train.lora.
Gives:  `adapt` (the factors beside each target; they alone are trained), and its Adapter: what a weight is with them,
        the model without them, the folder that peft loads; `check_targets`, before any weight is read.
Knows:  the targets: endings of the names of linear layers; the head is none of them.
Never:  changes a weight of the model: merging makes a tensor of its own. The only module with peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flux_ray.config import LoraConfig
from flux_ray.errors import UserError, unknown
from flux_ray.model.save import atomic_folder

ALL_LINEAR = "all-linear"
NAME = "default"  # of the one adapter, as peft calls it


@dataclass(frozen=True)
class Factors:
    """One weight's adapter: parameters A (rank, in) and B (out, rank), and alpha / rank."""

    a_RI: nn.Parameter
    b_OR: nn.Parameter
    scaling: float
    transposed: bool  # the weight is kept as (in, out)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + scaling·B·A, made in fp32, in W's type; a tensor of its own. Weight and factors must be whole."""
        a_RI, b_OR = self.a_RI.float(), self.b_OR.float()
        left, right = (a_RI.T, b_OR.T) if self.transposed else (b_OR, a_RI)
        return torch.addmm(weight.float(), left, right, alpha=self.scaling).to(weight.dtype)


class Adapter:
    """The factors of one model, by layer."""

    def __init__(self, layers: dict[str, nn.Module], lora: LoraConfig, *, targets: list[str]) -> None:
        self._layers, self._lora, self._targets = layers, lora, targets

    def factors(self) -> dict[str, Factors]:
        """Name of a weight as the model's checkpoint has it ► its factors."""
        return {
            f"{name}.weight": Factors(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME],
                                      layer.fan_in_fan_out)
            for name, layer in self._layers.items()
        }

    def checkpoint_name(self, name: str) -> str | None:
        """The name in the model's own checkpoint of an entry of the adapted model; None for the adapter's own."""
        for inner in (".lora_A.", ".lora_B."):
            if name.partition(inner)[0] in self._layers and inner in name:
                return None
        owner, inner, last = name.rpartition(".base_layer.")
        return f"{owner}.{last}" if inner and owner in self._layers else name

    @contextmanager
    def off(self) -> Iterator[None]:
        """While it lasts the model computes as it was loaded.

        The factors still run, times 0: under ZeRO-3 every module is called as often, and in the same order, as ever.
        """
        for layer in self._layers.values():
            layer.set_scale(NAME, 0)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.set_scale(NAME, 1)

    def save(self, folder: str | Path, trained: Iterable[tuple[str, Tensor]], *, base: str, task: str) -> None:
        """The folder that peft.PeftModel.from_pretrained puts onto the model at `base`, whole or not at all.

        `trained`: (name, whole tensor) of each trained parameter; `task`: peft's name of the kind of model.
        """
        tensors = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.detach().to("cpu", copy=True)
                   for name, tensor in trained}
        wholly = sorted({name.removeprefix("base_model.model.").rpartition(".")[0] for name in tensors
                         if ".lora_" not in name})
        transposed = any(factors.transposed for factors in self.factors().values())
        config = _peft_config(self._lora, self._targets, transposed=transposed, base_model_name_or_path=base,
                              task_type=task, modules_to_save=wholly or None, inference_mode=True)
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(temporary))


def adapt(hf: nn.Module, lora: LoraConfig, *, seed: int, train_head: bool) -> Adapter:
    """Put factors beside every target of a transformers model. They alone are trained, and with train_head its head.

    B is 0: nothing is changed yet. A is drawn from `seed` alone, so that every rank has the same. Raises UserError for
    a target that matches nothing, or what can't be adapted.
    """
    import peft

    names = _targets(hf, lora)
    modules = dict(hf.named_modules())
    transposed = any(isinstance(modules[name], Conv1D) for name in names)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs too, which each rank has done its way
        peft.inject_adapter_in_model(_peft_config(lora, names, transposed=transposed), hf, adapter_name=NAME)
    for head in _heads(hf):
        head.requires_grad_(train_head)
    layers = {name: module for name, module in hf.named_modules() if name in set(names)}
    return Adapter(layers, lora, targets=_endings(names, modules))


def check_targets(hf: nn.Module, lora: LoraConfig) -> None:
    """UserError, naming what would match, for a target that isn't a linear layer of the model; a `skeleton` will do."""
    _targets(hf, lora)


def _targets(hf: nn.Module, lora: LoraConfig) -> list[str]:
    """Full names of the layers to adapt."""
    modules = {name: module for name, module in hf.named_modules() if name}
    heads = [id(head) for head in _heads(hf)]
    linear = [name for name, module in modules.items()
              if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in heads]
    if lora.targets == ALL_LINEAR:
        return linear
    last_names = sorted({_last(name) for name in linear})
    chosen: set[str] = set()
    for target in [lora.targets] if isinstance(lora.targets, str) else lora.targets:
        matched = [name for name in modules if _matches(name, target)]
        if not matched:
            raise unknown("layer in train.lora.targets", target, [*last_names, ALL_LINEAR])
        for name in matched:
            if name not in linear:
                kind = "the model's head" if id(modules[name]) in heads else type(modules[name]).__name__
                raise UserError(f"train.lora.targets: {target!r} is {name} ({kind}): linear layers other than the head "
                                f"can be adapted ({', '.join(last_names)})")
        chosen.update(matched)
    return [name for name in linear if name in chosen]


def _heads(hf: nn.Module) -> list[nn.Module]:
    """What stands on top: a language model's head, or that of a sequence classification model."""
    return [head for head in (hf.get_output_embeddings(), getattr(hf, "score", None)) if head is not None]


def _endings(names: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The shortest list that means these layers: the last parts of their names where they mean no others."""
    endings = sorted({_last(name) for name in names})
    matched = {name for name in modules if any(_matches(name, ending) for ending in endings)}
    return endings if matched == set(names) else names


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _peft_config(lora: LoraConfig, targets: list[str], *, transposed: bool, **more: object) -> Any:
    import peft

    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
                           fan_in_fan_out=transposed, **more)
