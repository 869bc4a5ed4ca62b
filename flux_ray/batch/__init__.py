"""Packing by token budget, the padded views of a micro-batch, the weights of its tokens; many callers of one model."""

from flux_ray.batch.micro_batch import MicroBatch, make_micro_batch, padded_mask, to_flat, to_padded, without_weight
from flux_ray.batch.pack import balance, pack
from flux_ray.batch.pairs import pair_samples
from flux_ray.batch.rewards import estimated
from flux_ray.batch.samples import ResponseViews, Weighting, make_samples, response_views
from flux_ray.batch.serving import Serving
from flux_ray.batch.weights import AGGREGATIONS, StepCounts, divisor, loss_weights, step_counts

__all__ = [
    "AGGREGATIONS", "MicroBatch", "ResponseViews", "Serving", "StepCounts", "Weighting", "balance", "divisor",
    "estimated", "loss_weights", "make_micro_batch", "make_samples", "pack", "padded_mask", "pair_samples",
    "response_views", "step_counts", "to_flat", "to_padded", "without_weight",
]
