"""A rollout of two turns with a tool: the policy writes, a calculator answers, the policy goes on.

    flux-ray train ... rollout.function=examples/calculator.py:with_calculator 'rollout.stop=["="]' \\
        rollout.max_model_len=1024

Where the policy's text holds an expression that ends in "=", such as 12+30=, the calculator writes the result after it
(after the whole turn: rollout.stop ends it there).
The result is seen by the policy and never trained on: its tokens enter with a mask of False.
"""

from __future__ import annotations

import asyncio
import operator
import re

from flux_ray.records import FINISH_LENGTH, Prompt, Trajectory
from flux_ray.rollout.functions import Generate, Turns

EXPRESSION = re.compile(r"(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*=")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculate(text: str) -> str | None:
    """The result of the last expression in the text; None where it has none.

    >>> calculate("I need 12+30= and then"), calculate("hello")
    ('42', None)
    """
    found = EXPRESSION.findall(text)
    if not found:
        return None
    left, sign, right = found[-1]
    return str(OPERATIONS[sign](int(left), int(right)))


async def with_calculator(prompt: Prompt, generate: Generate) -> list[Trajectory]:
    """The G trajectories of a prompt, side by side; each has one turn, or two with the calculator between them."""

    async def one(sample: int) -> Trajectory:
        turns = Turns(prompt.token_ids)
        (first,) = await generate(turns.token_ids, sample=sample)
        turns.sampled(first)
        result = calculate(generate.tokenizer.decode(first.token_ids))
        if result is not None and first.finish_reason != FINISH_LENGTH:
            turns.observed(generate.tokenizer.encode(result, add_special_tokens=False))
            (second,) = await generate(turns.token_ids, sample=sample)
            turns.sampled(second)
        return turns.finish()

    return list(await asyncio.gather(*(one(sample) for sample in range(prompt.num_samples))))
