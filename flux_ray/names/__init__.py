"""What people call an option, and what it is called here."""

from flux_ray.names.options import (
    ALGORITHM_ALIASES,
    ALIASES,
    RENAMED,
    REWARD_MODEL,
    SECTION_ALIASES,
    canonical,
    explain,
    flatten,
    refuse_ambiguous,
    reward_model_path,
    reward_name,
    sections_of,
    unknown_option,
)
from flux_ray.names.others import our_value

__all__ = [
    "ALGORITHM_ALIASES",
    "ALIASES",
    "RENAMED",
    "REWARD_MODEL",
    "SECTION_ALIASES",
    "canonical",
    "explain",
    "flatten",
    "our_value",
    "refuse_ambiguous",
    "reward_model_path",
    "reward_name",
    "sections_of",
    "unknown_option",
]
