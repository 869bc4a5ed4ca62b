"""Low-rank adapters (LoRA, arXiv 2106.09685): W stays as loaded, a layer computes with W + (alpha/rank)·B·A.

Takes:  a PolicyModel or a ScoreModel as it was loaded, train.lora.
Gives:  `adapt` (the factors beside each target; they alone are trained), and its Adapter: what a weight is with them,
        the model without them, the folder that peft loads; `check_targets`, before any weight is read.
Knows:  the targets: endings of the names of linear layers, the head aside, and of a mixture's experts, which
        transformers keeps as one tensor a layer.
Never:  changes a weight of the model: merging makes a tensor of its own. The only module with peft.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from flux_ray.config import LoraConfig
from flux_ray.errors import UserError, unknown
from flux_ray.model.save import atomic_folder

ALL_LINEAR = "all-linear"
NAME = "default"  # of the one adapter, as peft calls it


class Targets(NamedTuple):
    """Names, or endings of names: of linear layers, and of tensors that hold a layer's experts."""

    linear: list[str]
    experts: list[str]


@dataclass(frozen=True)
class Factors:
    """One weight's adapter: parameters A (rank, in) and B (out, rank), and alpha / rank. Of a layer's E experts, whose
    weight is (E, out, in), they are A (E·rank, in) and B (out, rank·E), where an expert's columns lie E apart."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    transposed: bool  # the weight, or each expert's, is kept as (in, out)
    num_experts: int | None = None

    def of_expert(self, expert: int) -> Factors:
        assert self.num_experts is not None, "it adapts one matrix"
        b_ORE = self.b_OR.view(len(self.b_OR), -1, self.num_experts)
        a_ERI = self.a_RI.view(self.num_experts, -1, self.a_RI.shape[1])
        return replace(self, a_RI=a_ERI[expert], b_OR=b_ORE[..., expert], num_experts=None)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """W + scaling·B·A, made in fp32, in W's type; a tensor of its own. Weight and factors must be whole."""
        if self.num_experts is not None:
            return torch.stack([self.of_expert(i).merged(of_expert) for i, of_expert in enumerate(weight)])
        a_RI, b_OR = self.a_RI.float(), self.b_OR.float()
        left, right = (a_RI.T, b_OR.T) if self.transposed else (b_OR, a_RI)
        return torch.addmm(weight.float(), left, right, alpha=self.scaling).to(weight.dtype)


class Adapter:
    """The factors of one model, by weight."""

    def __init__(self, layers: dict[str, Any], lora: LoraConfig, *, targets: Targets) -> None:
        """`layers`: peft's, by the name of the weight that each adapts."""
        self._layers, self._lora, self._targets = layers, lora, targets
        self._owners = {name.rpartition(".")[0] for name in layers}

    def factors(self) -> dict[str, Factors]:
        """Name of a weight as the model's checkpoint has it ► its factors."""
        return {name: _factors(layer) for name, layer in self._layers.items()}

    def checkpoint_name(self, name: str) -> str | None:
        """The name in the model's own checkpoint of an entry of the adapted model; None for the adapter's own."""
        plain = _plain(name)
        for inner in (".lora_A.", ".lora_B."):
            if inner in plain and plain.partition(inner)[0] in self._owners:
                return None
        return plain if plain.rpartition(".")[0] in self._owners else name

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
        transposed = any(factors.transposed for factors in self.factors().values() if factors.num_experts is None)
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

    targets = _targets(hf, lora)
    modules = dict(hf.named_modules())
    endings = Targets(_endings(targets.linear, modules, num_parts=1),
                      _endings(targets.experts, _experts(hf), num_parts=2))
    transposed = any(isinstance(modules[name], Conv1D) for name in targets.linear)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds GPUs too, which each rank has done its way
        peft.inject_adapter_in_model(_peft_config(lora, targets, transposed=transposed), hf, adapter_name=NAME)
    for head in _heads(hf):
        head.requires_grad_(train_head)
    layers = {f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}": module
              for name, module in hf.named_modules() if hasattr(module, "lora_A")}
    return Adapter(layers, lora, targets=endings)


def check_targets(hf: nn.Module, lora: LoraConfig) -> None:
    """UserError, naming what would match, for a target that can't be adapted; a `skeleton` will do."""
    _targets(hf, lora)


def _targets(hf: nn.Module, lora: LoraConfig) -> Targets:
    """What is to be adapted, by full names."""
    modules = {name: module for name, module in hf.named_modules() if name}
    heads = [id(head) for head in _heads(hf)]
    linear = [name for name, module in modules.items()
              if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in heads]
    if lora.targets == ALL_LINEAR:
        return Targets(linear, [])
    experts = _experts(hf)
    known = sorted({_last(name) for name in linear} | {_last(name, 2) for name in experts})
    chosen: set[str] = set()
    for target in [lora.targets] if isinstance(lora.targets, str) else lora.targets:
        of_experts = [name for name in experts if _matches(name, target) or _matches(name.rpartition(".")[0], target)]
        holders = {name.rpartition(".")[0] for name in experts}
        matched = [name for name in modules if _matches(name, target) and name not in holders]
        if not matched and not of_experts:
            raise unknown("layer in train.lora.targets", target, [*known, ALL_LINEAR])
        for name in matched:
            if name not in linear:
                kind = "the model's head" if id(modules[name]) in heads else type(modules[name]).__name__
                raise UserError(f"train.lora.targets: {target!r} is {name} ({kind}): linear layers other than the head "
                                f"can be adapted{', and experts' if experts else ''} ({', '.join(known)})")
        chosen.update(matched, of_experts)
    found = Targets([name for name in linear if name in chosen], [name for name in experts if name in chosen])
    if found.experts and lora.dropout:
        raise UserError(f"train.lora.dropout={lora.dropout:g} with experts in train.lora.targets "
                        f"({_last(found.experts[0], 2)}): what is adapted there is a weight without an input of its "
                        "own: set it to 0")
    return found


def _experts(hf: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that hold all experts of a layer."""
    return {f"{name}.{own}": parameter for name, module in hf.named_modules() if not isinstance(module, _ConvNd)
            for own, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}


def _heads(hf: nn.Module) -> list[nn.Module]:
    """What stands on top: a language model's head, or that of a sequence classification model."""
    return [head for head in (hf.get_output_embeddings(), getattr(hf, "score", None)) if head is not None]


def _endings(names: list[str], among: Iterable[str], *, num_parts: int) -> list[str]:
    """The shortest list that means these: the last parts of their names where they mean no others."""
    endings = sorted({_last(name, num_parts) for name in names})
    matched = {name for name in among if any(_matches(name, ending) for ending in endings)}
    return endings if matched == set(names) else names


def _last(name: str, num_parts: int = 1) -> str:
    return ".".join(name.split(".")[-num_parts:])


def _plain(name: str) -> str:
    """Without the layers of peft that are around others."""
    return name.replace(".base_layer", "")


def _factors(layer: Any) -> Factors:
    """Of one of peft's layers: a linear one, or one around a tensor of experts."""
    a_RI, b_OR, scaling = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]
    if not hasattr(layer, "parameter_name"):
        return Factors(a_RI, b_OR, scaling, layer.fan_in_fan_out)
    # peft takes the middle axis for the inputs, unless it has noted otherwise.
    return Factors(a_RI, b_OR, scaling, not layer._did_swap_in_out_features, layer.num_experts)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _peft_config(lora: LoraConfig, targets: Targets, *, transposed: bool, **more: object) -> Any:
    import peft

    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets.linear,
                           target_parameters=targets.experts or None, fan_in_fan_out=transposed, **more)
