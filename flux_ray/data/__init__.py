"""Rows of every format; the stream of prompts, of supervised examples and of preference pairs."""

from flux_ray.data.pairs import PairSource
from flux_ray.data.prompts import PromptSource
from flux_ray.data.sft import SftSource

__all__ = ["PairSource", "PromptSource", "SftSource"]
