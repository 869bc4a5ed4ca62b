"""New weights of a running model on CPU, made ready beside its forward passes and put in place between two of them.

Takes:  a vLLM model whose layers hold plain weights; tensors by their names in a checkpoint.
Gives:  `ShadowModel` and `can_have_shadow`; `tied_heads`.
Knows:  most of a load is what vLLM does with a layer's weights before it computes with them: on CPU it packs them for
        oneDNN. Its reload does that to whatever modules it is given, here to ones that the forward passes don't use.
Never:  touches the running model before `put_in_place`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn

OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # of a shadow; it shares all else at first


class TiedHead(NamedTuple):
    """An LM head and the embedding whose weight it has.

    On CPU vLLM packs the head's weight into a buffer of its own at load. A reload replaces the embedding that it was
    packed from and leaves the packed copy old, which no checksum of parameters can see: tie again and pack again.
    """

    head: nn.Module
    embedding: nn.Module

    def renew(self) -> None:
        self.head.weight = self.embedding.weight
        self.head.quant_method.process_weights_after_loading(self.head)


def tied_heads(model: nn.Module) -> list[TiedHead]:
    """Whatever a model calls them: heads that have one weight with another module."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    modules = [module for module in model.modules() if isinstance(getattr(module, "weight", None), Tensor)]
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    others = {id(module.weight): module for module in modules if not isinstance(module, ParallelLMHead)}
    return [TiedHead(head, others[id(head.weight)]) for head in heads if id(head.weight) in others]


def can_have_shadow(model: nn.Module) -> bool:
    """Whether each layer's weights are made ready by what stands in the layer alone: not of experts, not quantized."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    return all(type(getattr(module, "quant_method", None)) in plain for module in model.modules())


class ShadowModel:
    """One update: `load` and `finish` beside the running model, then `put_in_place` between two forward passes."""

    def __init__(self, model: nn.Module, tied: Iterable[TiedHead]) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        self._shadows: dict[nn.Module, nn.Module] = {}
        self._tied = list(tied)
        self._model = self._shadow_of(model)
        for layer, shadow in self._shadows.items():
            known, info = get_layerwise_info(layer), get_layerwise_info(shadow)
            parameters, buffers = known.restore_metadata
            info.restore_metadata = _for_shadow(parameters, layer, shadow), _for_shadow(buffers, layer, shadow)
            info.restore_device = known.restore_device
            for name, parameter in shadow._parameters.items():
                if parameter is not None and name not in parameters:  # one that vLLM loads in place, such as a bias
                    shadow._parameters[name] = _copied(parameter)
            for name, buffer in shadow._buffers.items():
                if buffer is not None and name not in buffers and name not in shadow._non_persistent_buffers_set:
                    shadow._buffers[name] = buffer.clone()
        initialize_layerwise_reload(self._model)
        for shadow in self._shadows.values():
            get_layerwise_info(shadow).kernel_tensors = None  # they are the running model's: nothing may write to them

    def _shadow_of(self, module: nn.Module) -> nn.Module:
        """A module of the same class and settings. One that stands in two places stands there in the shadow too."""
        if module not in self._shadows:
            shadow = self._shadows[module] = object.__new__(type(module))
            shadow.__dict__.update(module.__dict__)
            shadow.__dict__.update({name: type(module.__dict__[name])(module.__dict__[name]) for name in OWN})
            for name, child in module._modules.items():
                shadow._modules[name] = None if child is None else self._shadow_of(child)
        return self._shadows[module]

    def of(self, module: nn.Module) -> nn.Module:
        """The shadow of one of the model's modules."""
        return self._shadows[module]

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with disable_mtp_completeness_check():  # a bucket is never the whole model
            self._model.load_weights(tensors)  # type: ignore[operator]

    @torch.no_grad()
    def finish(self) -> None:
        """Make ready the layers that wait for tensors which no checkpoint has (padding), and the tied heads."""
        from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info

        ready = set()
        for layer, shadow in self._shadows.items():
            info = get_layerwise_info(shadow)
            if info.can_load() and info.load_numel > 0:
                _layerwise_process(shadow, info)
            if not info.can_load():
                ready.add(layer)
        for head, embedding in self._tied:
            TiedHead(self._shadows[head], self._shadows[embedding]).renew()
        self._ready = [layer for layer in self._shadows if layer in ready.union(tied.head for tied in self._tied)]

    @torch.no_grad()
    def put_in_place(self, dtype: torch.dtype) -> None:
        """Give the model the new weights. No forward pass may run meanwhile. `dtype`: the model's."""
        from vllm.model_executor.layers.attention import is_deferred_attention_layer

        seen: set[int] = set()
        for layer in self._ready:
            shadow = self._shadows[layer]
            for name, tensor in _loaded(layer):
                if id(tensor) not in seen:
                    tensor.data.copy_(getattr(shadow, name))
                    seen.add(id(tensor))
            layer.__dict__.update({name: value for name, value in shadow.__dict__.items()
                                   if name not in OWN and value is not layer.__dict__.get(name)})
        for layer in self._shadows:
            if is_deferred_attention_layer(layer):  # some compute with what they derive from their projections
                layer.process_weights_after_loading(dtype)  # type: ignore[operator]
        self.forget()

    def forget(self) -> None:
        """Drop what vLLM keeps of the shadow. It holds the shadow, so that neither would be freed."""
        from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

        for shadow in self._shadows.values():
            LAYERWISE_INFO.pop(shadow, None)
            shadow.__dict__.clear()


def _loaded(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that a checkpoint has."""
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in layer._buffers.items():
        if buffer is not None and name not in layer._non_persistent_buffers_set:
            yield name, buffer


def _for_shadow(described: dict[str, Tensor], layer: nn.Module, shadow: nn.Module) -> dict[str, Tensor]:
    """What vLLM knows of the layer's tensors before it has packed them, with loaders of the shadow's."""
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor

    copies = {name: to_meta_tensor(tensor) for name, tensor in described.items()}
    for copy in copies.values():
        if hasattr(copy, "weight_loader"):  # which an earlier reload may have wrapped
            copy.weight_loader = _get_original_loader(copy)  # type: ignore[attr-defined]
        for key, value in copy.__dict__.items():
            if isinstance(value, MethodType) and value.__self__ is layer:
                copy.__dict__[key] = MethodType(value.__func__, shadow)
    return copies


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    """With memory of its own; class and attributes (such as its loader) are the parameter's."""
    copy = parameter.detach().clone()
    copy.__class__ = parameter.__class__
    copy.__dict__ = dict(parameter.__dict__)
    return copy  # type: ignore[return-value]
