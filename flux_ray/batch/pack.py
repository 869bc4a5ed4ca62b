"""Which samples run together, and which groups go to which rank.

Takes:  Samples and the budget of one micro-batch; token counts of groups and a number of ranks.
Gives:  `pack`: micro-batches in which every sample is once; `balance`: groups per rank.
Knows:  two layouts: padded rows (cost: rows times longest) and packed tokens (cost: their sum).
Never:  splits a sample or a group, looks at an advantage, or draws at random: the same input gives the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flux_ray.batch.micro_batch import MicroBatch, make_micro_batch
from flux_ray.records import Sample

#: Padding that one more micro-batch is worth. A processor pays few tokens for it; a GPU waits for the thousands of
#: calls that a forward and a backward are, whatever they compute (docs/benchmarks.md).
MICRO_BATCH_TOKENS = {"cpu": 48, "cuda": 2048}


def pack(
    samples: Sequence[Sample], *, max_tokens: int, max_samples: int | None = None, padded: bool, unit: int = 1,
    device: str = "cpu",
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens and `max_samples` sequences; a longer unit is alone in one.

    unit: so many consecutive samples stay side by side in one micro-batch (2 for pairs), be there room or not.
    padded: the budget counts rows times the longest row; samples are taken by length, and a micro-batch ends early
    where that saves more padding than another one costs on the `device`.
    Otherwise: first-fit decreasing over the plain sum of tokens.
    """
    assert max_tokens > 0 and (max_samples is None or max_samples > 0), (max_tokens, max_samples)
    assert len(samples) % unit == 0, (len(samples), unit)
    units = [range(first, first + unit) for first in range(0, len(samples), unit)]
    lengths = [[samples[i].num_tokens for i in ids] for ids in units]
    costs = [unit * max(each) if padded else sum(each) for each in lengths]
    order = sorted(range(len(units)), key=lambda k: (-costs[k], k))
    room = len(units) if max_samples is None else max(max_samples // unit, 1)
    if padded:
        plan = _rows(costs, order, max_tokens, room, each=MICRO_BATCH_TOKENS["cuda" if "cuda" in device else "cpu"])
    else:
        plan = _first_fit(costs, order, max_tokens, room)
    ids_of = [[i for k in chosen for i in units[k]] for chosen in plan]
    return [make_micro_batch([samples[i] for i in ids], sample_ids=ids) for ids in ids_of]


def _rows(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, max_samples: int, *, each: int,
) -> list[list[int]]:
    """Longest first, cut where the fewest tokens are forwarded: padding, and what each micro-batch costs by itself.

    The least over all cuts: the best way to the first b samples ends with some run a to b, after the best way to a.
    """
    sorted_lengths = [lengths[i] for i in order]
    least, begins = [0.0] + [math.inf] * len(order), [0] * (len(order) + 1)
    for a, longest in enumerate(sorted_lengths):
        rows = max(min(max_tokens // longest, max_samples, len(order) - a), 1)
        for b in range(a + 1, a + rows + 1):
            cost = least[a] + each + (b - a) * longest
            if cost < least[b]:
                least[b], begins[b] = cost, a
    plan, end = [], len(order)
    while end:
        plan.append(list(order[begins[end] : end]))
        end = begins[end]
    return plan[::-1]


def _first_fit(lengths: Sequence[int], order: Sequence[int], max_tokens: int, max_samples: int) -> list[list[int]]:
    plan: list[list[int]] = []
    used: list[int] = []
    for i in order:
        fits = (k for k in range(len(plan)) if used[k] + lengths[i] <= max_tokens and len(plan[k]) < max_samples)
        k = next(fits, None)
        if k is None:
            plan.append([i])
            used.append(lengths[i])
        else:
            plan[k].append(i)
            used[k] += lengths[i]
    return plan


def balance(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Items (groups, by their tokens) to ranks: the longest first, each to the rank with the fewest tokens and room.

    Room comes first: counts differ by at most 1. Each rank then holds as many groups as any other, so memory and the
    number of micro-batches stay alike; with the longest placed first the tokens come out nearly even within that. Ties
    go to the lower rank. Each rank's items are in ascending order.
    """
    assert num_ranks > 0, num_ranks
    at_least, num_larger = divmod(len(num_tokens), num_ranks)
    items: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for i in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        num_full = sum(len(mine) > at_least for mine in items)
        limit = at_least + (num_full < num_larger)
        rank = min((r for r in range(num_ranks) if len(items[r]) < limit), key=lambda r: (loads[r], r))
        items[rank].append(i)
        loads[rank] += num_tokens[i]
    return [sorted(mine) for mine in items]
