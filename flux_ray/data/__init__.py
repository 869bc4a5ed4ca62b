"""Rows of every format; the streams of prompts, supervised examples, preference pairs, groups rolled out before."""

from flux_ray.data.groups import GroupSource, OfflineGroup, are_groups
from flux_ray.data.pairs import PairSource
from flux_ray.data.prompts import PromptSource
from flux_ray.data.sft import SftSource

__all__ = ["GroupSource", "OfflineGroup", "PairSource", "PromptSource", "SftSource", "are_groups"]
