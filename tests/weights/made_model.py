"""A model as vLLM keeps one on CPU, made of plain modules: packed projections, copies that the layers compute with.

Takes:  nothing of vLLM.
Gives:  Made: `weights` by their names in a checkpoint, `load`, which takes all of them as a reload does.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTH, LAYERS, VOCABULARY = 32, 2, 60
PADDED = 64  # rows of the embedding


class Packed(nn.Module):
    """A linear layer: after `pack` the weight is gone, unless it is kept; as vLLM's on CPU."""

    def __init__(self, rows, *, keep=False, bias=False):
        super().__init__()
        self.input_size_per_partition, self._rows, self._keep = WIDTH, rows, keep
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows), requires_grad=False)

    def pack(self, weight):
        copy = weight.T.contiguous()
        self.cpu_linear = lambda x, weight, bias: x @ copy
        self.weight = nn.Parameter(weight if self._keep else weight.new_empty(0), requires_grad=False)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH), requires_grad=False)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj, self.o_proj = Packed(2 * WIDTH, bias=True), Packed(WIDTH)
        self.gate_up_proj, self.norm = Packed(4 * WIDTH), Norm()


class Made(nn.Module):
    def __init__(self, *, dtype, seed):
        super().__init__()
        self.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"],
                                       "gate_up_proj": ["gate_proj", "up_proj"]}
        generator = torch.Generator().manual_seed(seed)
        self.embed_tokens, self.norm = Packed(PADDED, keep=True), Norm()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.lm_head = Packed(PADDED, keep=True)

        def drawn(*shape):
            return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

        self.weights = {"embed_tokens.weight": drawn(VOCABULARY, WIDTH), "norm.weight": drawn(WIDTH)}
        for i in range(LAYERS):
            rows = {"q_proj": WIDTH, "k_proj": WIDTH // 2, "v_proj": WIDTH // 2, "o_proj": WIDTH,
                    "gate_proj": 2 * WIDTH, "up_proj": 2 * WIDTH}
            self.weights |= {f"layers.{i}.{name}.weight": drawn(num, WIDTH) for name, num in rows.items()}
            self.weights |= {f"layers.{i}.{name}.bias": drawn(rows[name]) for name in ("q_proj", "k_proj", "v_proj")}
            self.weights[f"layers.{i}.norm.weight"] = drawn(WIDTH)
        self.load(self.weights)
        self.lm_head.weight = self.embed_tokens.weight  # tied, as an engine is when an update begins

    def load(self, weights, *, stale=()):
        """`stale`: paths of modules that are left as they were."""
        for path, module in self.named_modules():
            if path in stale or not hasattr(module, "weight"):
                continue
            if path == "lm_head":
                module.pack(self.embed_tokens.weight)
                module.weight = self.embed_tokens.weight
                continue
            weight = self._packed(path, "weight", weights)
            if isinstance(module, Norm):
                module.weight = nn.Parameter(weight.clone(), requires_grad=False)
                continue
            rows = module._rows - len(weight)
            module.pack(torch.cat([weight, weight.new_zeros(rows, WIDTH)]))
            if hasattr(module, "bias"):
                module.bias = nn.Parameter(self._packed(path, "bias", weights).clone(), requires_grad=False)

    def _packed(self, path, attribute, weights):
        before, _, last = path.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        names = [f"{before}.{part}.{attribute}".lstrip(".") for part in parts]
        return torch.cat([weights[name] for name in names])
