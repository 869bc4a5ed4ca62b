"""Experts of a running vLLM model on CPU, made ready again after an update.

Takes:  a vLLM model, before its layers are loaded anew.
Gives:  `pack_anew`.
Knows:  vLLM 0.32 packs experts for its CPU kernel where it makes that kernel, once: at the first load. A reload would
        copy plain weights over packed ones, and log-probs would be off by nats.
"""

from __future__ import annotations

from torch import nn


def pack_anew(model: nn.Module) -> None:
    """The load that follows makes the kernels of experts again, and packs for them. No forward pass may run until it
    has ended."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None
