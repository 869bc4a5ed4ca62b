"""The frozen policy's log-probs."""

from flux_ray.reference.reference import Reference

__all__ = ["Reference"]
