"""Whether a model holds what was sent: an engine worker's check of each update.

Takes:  the model, what came in, and at the end the sender's checksums (checksum.py).
Gives:  `Receipts.wrong`: the names that aren't as they were sent, with what is wrong.
Knows:  where vLLM keeps a parameter: under its name, or as rows of a packed one (qkv). On CPU the layer computes with
        a packed copy, which is read back by what it makes of columns of the identity.
Never:  calls a tensor wrong for the way in which vLLM keeps it: only where another of its kind has been right.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_ray.weights.attest_experts import ExpertReceipts
from flux_ray.weights.buckets import Param
from flux_ray.weights.checksum import checksum

MOST_NAMES = 8  # told of one update
FEWEST_COLUMNS, READ_BACK = 8, 2**14  # of a packed copy: so many columns at least, and so many numbers
TINY = 2.0**-126  # smaller ones a processor may take for zero
NOT_PACKED = "was not packed anew"


class Place(NamedTuple):
    """Where the model keeps a parameter that is sent: rows of a module's tensor."""

    module: nn.Module
    attribute: str
    start: int
    total: int | None  # rows of all parts that are packed into the tensor; None: it holds this parameter alone


@dataclass
class Update:
    """What is known of one."""

    params: dict[str, Param] = field(default_factory=dict)
    received: dict[str, Tensor] = field(default_factory=dict)  # checksums, where the bytes were seen
    columns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # which ones, and (rows, columns) of them
    packed: dict[nn.Module, weakref.ref[Any]] = field(default_factory=dict)  # copies of before
    read_ahead: dict[tuple[str, nn.Module], Any] = field(default_factory=dict)  # copies that were found to be right
    sees_bytes: bool = False


class Receipts:
    def __init__(self, model: nn.Module, *, num_workers: int = 1) -> None:
        """`num_workers`: of the engine. Of several, each holds parts that aren't checked beyond what came in."""
        self._model, self._num_workers = model, num_workers
        self._tied = _tied(model)  # as it was loaded: an update may untie a head
        self._right: set[tuple[str, str]] = set()  # kinds of parameters, by check: one of them was as it was sent
        self._places: dict[str, Place] = {}
        self._placed: dict[str, Param] = {}  # those that `_places` was made for
        self._update = Update()
        self._experts = ExpertReceipts(model) if num_workers == 1 else None
        self._turn = 0

    def begin(self) -> None:
        """An update begins; what was known of one that broke off is forgotten."""
        self._turn += 1
        if self._experts is not None:
            self._experts.begin()
        self._update = Update(packed={module: weakref.ref(module.cpu_linear) for module in self._model.modules()
                                      if _is_packed(module)})

    def expect(self, params: Iterable[Param]) -> None:
        self._update.params |= {param.name: param for param in params}
        if self._update.params != self._placed:
            self._places, self._placed = places(self._model, list(self._update.params.values())), self._update.params

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The bytes that came, before they are loaded."""
        self._update.sees_bytes = True
        tensors = list(tensors)
        if self._experts is not None:
            self._experts.take(tensors)
        for name, tensor in tensors:
            self._update.received[name] = checksum(tensor)
            place = self._places.get(name)
            if place is not None and self._num_workers == 1 and tensor.ndim == 2 \
                    and _reads(place.module, tensor.shape[1]):
                which = self._which(tensor)
                self._update.columns[name] = which, tensor[:, which].clone()

    @torch.no_grad()
    def read_ahead(self, shadow_of: Callable[[nn.Module], nn.Module]) -> None:
        """Read back the packed copies while they wait for their place in the model, whose engine doesn't wait for it.

        `shadow_of`: the module that holds what a module of the model will hold.
        """
        for name, (which, columns) in self._update.columns.items():
            for module in self._sharing(self._places[name]):
                shadow = shadow_of(module)
                if _read_back(shadow, which, columns, start=self._places[name].start):
                    self._update.read_ahead[name, module] = shadow.cpu_linear

    @torch.no_grad()
    def wrong(self, sent: Mapping[str, int]) -> list[str]:
        """What isn't as it was sent, now that all is loaded; some names of it where there are many."""
        update, self._update = self._update, Update()
        wrong = {name: "did not come" for name in sent if name not in update.params}
        if update.sees_bytes:
            wrong |= {name: "came otherwise than it was sent" for name, there in update.received.items()
                      if int(there) != sent.get(name)}
            wrong |= {name: "did not come" for name in sent if name not in update.received}
        checked = {name: self._as_held(name, sent[name], update) for name in sent if name not in wrong}
        for name, of in checked.items():
            self._right |= {(_kind(name), check) for check, right in of.items() if right}
        for name, of in checked.items():
            failed = [check for check, right in of.items()
                      if not right and (check == NOT_PACKED or (_kind(name), check) in self._right)]
            if failed:
                wrong[name] = failed[0]
        if self._experts is not None:
            wrong |= dict.fromkeys(self._experts.wrong(), "is not what was sent in the experts that the engine uses")
        return [f"{name} {why}" for name, why in list(wrong.items())[:MOST_NAMES]]

    def _which(self, tensor: Tensor) -> Tensor:
        """Columns to read back: others each time, all of a small tensor."""
        rows, width = tensor.shape
        num = min(width, max(FEWEST_COLUMNS, -(-READ_BACK // max(rows, 1))))
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self._turn), device="cpu")
        return order[:num].to(tensor.device)

    def _as_held(self, name: str, sent: int, update: Update) -> dict[str, bool]:
        """Check ► whether the model passes it, for those that can be made."""
        place = self._places.get(name)
        if place is None:
            return {}
        checks = {}
        for module in self._sharing(place):
            of = "" if module is place.module else " in a tied module"
            held = self._held(place._replace(module=module), update.params[name])
            if held is not None:
                checks[f"is not what was sent{of}"] = int(checksum(held)) == sent
            if place.attribute == "weight" and module in update.packed and name in update.received:
                checks[NOT_PACKED] = checks.get(NOT_PACKED, True) and update.packed[module]() is not module.cpu_linear
            if name in update.columns:
                known = update.read_ahead.get((name, module))
                read = (known is not None and known is module.cpu_linear) or _read_back(
                    module, *update.columns[name], start=place.start)
                if read is not None:
                    checks[f"has a packed copy{of} that is not what was sent"] = read
        return checks

    def _sharing(self, place: Place) -> list[nn.Module]:
        """The module, and those that have the same weight."""
        return [place.module, *(self._tied.get(place.module, ()) if place.attribute == "weight" else ())]

    def _held(self, place: Place, param: Param) -> Tensor | None:
        """The tensor of the model that should have the same bytes; None where it is kept in another form."""
        tensor = getattr(place.module, place.attribute, None)
        if not isinstance(tensor, Tensor) or tensor.dtype != param.dtype or tensor.ndim != len(param.shape):
            return None
        if tuple(tensor.shape) == param.shape and place.total is None:
            return tensor
        fits = tensor.ndim and (len(tensor) == place.total if place.total else len(tensor) > param.shape[0])
        if self._num_workers > 1 or not fits:
            return None
        rows = tensor[place.start : place.start + param.shape[0]]
        return rows if tuple(rows.shape) == param.shape else None


def places(model: nn.Module, params: Sequence[Param]) -> dict[str, Place]:
    """Where the model keeps each of these, as far as its names tell."""
    targets: dict[str, list[tuple[nn.Module, str]]] = {}  # by each end of a name
    for path, module in model.named_modules():
        for attribute in (*module._parameters, *module._buffers):
            parts = [*path.split("."), attribute] if path else [attribute]
            for i in range(len(parts)):
                targets.setdefault(".".join(parts[i:]), []).append((module, attribute))
    full = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    shapes = {param.name: param.shape for param in params}
    renamed = _renamed(model, list(shapes))
    found = {}
    for name in shapes:
        into, parts_of = _packed_name(model, name)
        looked_up = renamed.get(name, name) if into == name else _packed_name(model, renamed.get(name, name))[0]
        at = targets.get(looked_up, [])
        exact = [(model.get_submodule(looked_up.rpartition(".")[0]), looked_up.rpartition(".")[2])] \
            if looked_up in full else at
        if len(exact) != 1:
            continue
        rows = [shapes[part][0] for part in parts_of if shapes.get(part)]
        if len(rows) == len(parts_of):
            before = parts_of.index(name) if parts_of else 0
            found[name] = Place(*exact[0], sum(rows[:before]), sum(rows) if parts_of else None)
    return found


def _tied(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Module ► the others that have one weight with it, and may pack it for themselves."""
    of_weight: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            of_weight.setdefault(id(module.weight), []).append(module)
    return {module: [other for other in modules if other is not module]
            for modules in of_weight.values() if len(modules) > 1 for module in modules}


def _renamed(model: nn.Module, names: list[str]) -> dict[str, str]:
    """As the model itself reads a checkpoint's names, where it has a table."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    given = {name: mapper.apply_list([name]) for name in names} if mapper is not None else {}
    return {name: to[0] for name, to in given.items() if len(to) == 1}


def _packed_name(model: nn.Module, name: str) -> tuple[str, list[str]]:
    """The parameter that this one is packed into, and the names of all its parts; the name itself and none."""
    parts = name.split(".")
    for into, of in getattr(model, "packed_modules_mapping", {}).items():
        at = [i for i, part in enumerate(parts) if part in of]
        if at and len(of) > 1:
            swap = [".".join([*parts[:at[-1]], other, *parts[at[-1] + 1:]]) for other in (into, *of)]
            return swap[0], swap[1:]
    return name, []


def _kind(name: str) -> str:
    """One for all layers.

    >>> _kind("model.layers.12.mlp.up_proj.weight")
    'model.layers.#.mlp.up_proj.weight'
    """
    return re.sub(r"\d+", "#", name)


def _is_packed(module: nn.Module) -> bool:
    """Whether it computes with a copy: torch's own function has none."""
    compute = module.__dict__.get("cpu_linear")
    return compute is not None and compute is not nn.functional.linear


def _reads(module: nn.Module, width: int) -> bool:
    inputs = getattr(module, "input_size_per_partition", getattr(module, "embedding_dim", None))
    return _is_packed(module) and inputs == width


def _read_back(module: nn.Module, which: Tensor, columns: Tensor, *, start: int) -> bool | None:
    """Whether the packed copy has these columns; None where it has another form."""
    width = getattr(module, "input_size_per_partition", getattr(module, "embedding_dim", 0))
    if not _is_packed(module) or not width:
        return None
    asked = torch.zeros(len(which), width, dtype=columns.dtype, device=columns.device)
    asked.scatter_(1, which[:, None], 1)
    try:
        made = module.cpu_linear(asked, module.weight, None)
    except RuntimeError:  # a kernel that takes other numbers than those which were sent
        return None
    if made.ndim != 2 or made.shape[1] < start + len(columns):
        return None
    there = made[:, start : start + len(columns)].T
    same = (there.float() - columns.float()).abs() <= TINY
    return bool((same | ~there.isfinite()).all())  # an infinite weight makes its whole row so
