"""What a model computes that not every attention, head or engine has, read from its skeleton.

Takes:  a transformers model on the meta device: modules without memory.
Gives:  Traits: what it asks of its attention, how its head makes logits, how its checkpoint keeps it (hub_names.py).
Knows:  one forward of the skeleton tells it: an attention notes what it is asked, and every operation on the head's
        output is noted. A field of a config counts where the model's own code acts on it, whatever it is called.
Never:  reads a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flux_ray.errors import UserError
from flux_ray.model.head import HeadForm
from flux_ray.model.hub_names import Parts, hub_parts

EAGER = "eager"  # the attention that a model's own file has: it knows all that the model asks
NUM_TOKENS = 8  # of the forward: nothing depends on how many
#: Arguments that every attention heeds, or that transformers turns into the mask for those that read one.
COMMON = frozenset({
    "scaling", "dropout", "is_causal", "sliding_window", "position_ids", "layer_idx", "use_cache", "cache_position",
    "output_attentions", "position_embeddings",
})
#: Attention ► the further arguments that it heeds.
HEEDS = {
    "sdpa": {"position_bias"},
    "causal_blocks": {"position_bias"},
    "torch_varlen": set(),
    "flash_attention_2": {"softcap"},
    "flash_attention_3": {"softcap", "s_aux"},
    "flash_attention_4": {"softcap", "s_aux"},
    "flex_attention": {"softcap", "s_aux"},
}
WORDS = {"softcap": "a cap on its attention's scores", "s_aux": "attention sinks",
         "position_bias": "a bias on its attention's scores", "indices": "sparse attention",
         "block_indices": "sparse attention", "own file": "an attention that only its own file has"}
#: What may happen to a tensor without a change of its numbers.
HARMLESS = frozenset({"contiguous", "float", "to", "type_as", "__getitem__", "__get__", "view", "reshape", "detach",
                      "_set_grad_enabled", "requires_grad_"})


#: What a model's code asks of numbers that a skeleton hasn't: whether no token is padding, whether positions rise by
#: one (they do), whether a padding token is among the tokens (it isn't).
ANSWERS = {"__bool__": True, "item": True, "__contains__": False}

#: What is done to tensors, in its order: a function's name, and its arguments that are no tensors.
Operations = list[tuple[str, list[object]]]


@dataclass(frozen=True)
class Traits:
    """`asks`: arguments that its attention gets beyond the common ones. `own_attention`: it lets nobody choose."""

    asks: frozenset[str]
    own_attention: bool
    head: HeadForm | None  # None: the model has no head of its own, as a score model
    parts: Parts = field(default_factory=dict)

    def unheeded(self, attention: str) -> list[str]:
        """What the model asks that this attention would pass over, in words."""
        if attention == EAGER or self.own_attention:
            return []
        return sorted({WORDS.get(name, name) for name in self.asks - HEEDS.get(attention, self.asks)})


def traits_of(skeleton: PreTrainedModel, name: str) -> Traits:
    """UserError, which says `name` and the reason, for a model that can't be trained or served as it computes."""
    kind = skeleton.config.model_type
    parts = hub_parts(skeleton, name)
    head = skeleton.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        raise UserError(f"{name} ({kind}): its head is {type(head).__name__}: only a linear layer is supported")
    try:
        asks, own_attention, operations = _trace(skeleton, head)
    except NotImplementedError as error:
        raise UserError(f"{name} ({kind}): {error}") from error
    except Exception as error:  # in whatever way it says that it can't
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        raise UserError(f"{name} ({kind}): what it computes can't be read from its skeleton: {reason}") from error
    form = None if head is None else _head_form(operations, head, f"{name} ({kind})")
    return Traits(asks, own_attention, form, parts)


def _trace(skeleton: PreTrainedModel, head: nn.Module | None) -> tuple[frozenset[str], bool, Operations]:
    """(what attention is asked, whether none of ours is, operations on hidden states behind the body and on logits)."""
    noted: set[str] = set()
    called: list[str] = []

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
             **more: object) -> tuple[Tensor, None]:
        noted.update(name for name, given in more.items() if given is not None and given is not False)
        if not (getattr(module, "is_causal", True) if more.get("is_causal") is None else more["is_causal"]):
            raise NotImplementedError("its tokens see those after them: only causal models are supported")
        called.append(type(module).__name__)
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    operations = _Operations()
    ids = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device="meta")
    with _attention(skeleton, note), operations, torch.no_grad():
        # Some models call a part of their body instead of the body: there the head alone says where to begin.
        hooks = [skeleton.base_model.register_forward_hook(lambda *_: operations.begin())]
        hooks += [] if head is None else [head.register_forward_pre_hook(lambda *_: operations.begin())]
        if isinstance(head, nn.Linear):
            hooks += [head.register_forward_pre_hook(lambda *_: operations.pause()),
                      head.register_forward_hook(lambda *_: operations.product())]
        try:
            (skeleton if head is not None else skeleton.base_model)(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if not getattr(skeleton, "_supports_sdpa", True):
        noted.add("own file")
    return frozenset(noted - COMMON), not called, operations.seen


@contextmanager
def _attention(skeleton: PreTrainedModel, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """While it lasts the skeleton's attention is `function`, and nobody makes a mask."""
    name, before = "noted", skeleton.config._attn_implementation
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    try:
        skeleton.set_attn_implementation(name)
        yield
    finally:
        skeleton.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


class _Operations(TorchFunctionMode):
    """Notes what is done to tensors from `begin` on; answers where the model's code asks for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Operations = []
        self._on = False

    def begin(self) -> None:
        self._on = True

    def pause(self) -> None:
        """A linear layer begins. ZeRO 3 makes several operations of its one, in any process that it has been in."""
        self._on = False

    def product(self) -> None:
        """It has ended."""
        self.seen.append(("linear", []))
        self._on = True

    def __torch_function__(self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, object] | None = None) -> object:
        name = func.__name__
        if name in ANSWERS and args[0].device.type == "meta":
            return ANSWERS[name]
        if self._on and name not in HARMLESS:
            self.seen.append((name, [arg for arg in args if not isinstance(arg, Tensor)]))
        return func(*args, **(kwargs or {}))


def _head_form(operations: Operations, head: nn.Linear, name: str) -> HeadForm:
    """From the operations behind the model's body: the head's product, and products with numbers, or one cap."""
    scale, inner, capped, behind = 1.0, 1.0, False, False  # behind: the head's own product has been
    for operation, given in operations:
        number = given[0] if len(given) == 1 and isinstance(given[0], (int, float)) else None
        times = operation in ("mul", "mul_", "__mul__", "__rmul__", "__imul__")
        by = operation in ("div", "div_", "true_divide", "__truediv__", "__itruediv__")
        if operation == "linear" and not behind:
            behind = True
        elif number is not None and (times or by) and (behind or head.bias is None):
            scale *= number if times else 1 / number
        elif operation in ("tanh", "tanh_") and behind and not capped:
            inner, scale, capped = scale, 1.0, True
        else:
            raise UserError(f"{name}: its logits are not a scaled or capped lm_head(hidden) ({operation} {given}): "
                            "such a head is not supported")
    if not behind:
        raise UserError(f"{name}: its logits don't come from its head over the hidden states of its body: such a head "
                        "is not supported")
    return HeadForm(inner * scale, scale) if capped else HeadForm(scale)
