"""Rows of every format; the stream of prompts and of supervised examples."""

from flux_ray.data.prompts import PromptSource
from flux_ray.data.sft import SftSource

__all__ = ["PromptSource", "SftSource"]
