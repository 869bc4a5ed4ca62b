"""`flux-ray generate MODEL FILE`: responses to a file of prompts.

Takes:  a run's folder or any model, prompts in any form that `data.train` has, options.
Gives:  a JSON object for each prompt, in the file's order: row, prompt, responses.
Knows:  prompts are encoded, and responses limited, as in training.
Never:  leaves half a file where the whole one was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from flux_ray.config import PolicyGradientConfig
from flux_ray.data import PromptSource
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.local_models import opened
from flux_ray.model import load_tokenizer
from flux_ray.model.stops import stop_token_ids
from flux_ray.models_of_runs import parsed, sampling_config_for
from flux_ray.records import Prompt, SamplingRequest
from flux_ray.rollout.local import LocalEngine, local_config
from flux_ray.rollout.texts import texts_of

USAGE = """\
flux-ray generate MODEL FILE [-o OUT] [OPTION=VALUE ...]

  flux-ray generate runs/mine prompts.jsonl -o responses.jsonl
  flux-ray generate Qwen/Qwen3-0.6B prompts.txt eval.num_samples=4 rollout.temperature=0.7

MODEL is a run's folder, whose options hold here too, or any model. FILE holds prompts as data.train does: rows with a
column `prompt`, or a text file with one on each line. Without -o the responses go to the terminal, a JSON
object a line.

  eval.num_samples   responses to each prompt
  eval.temperature   none: rollout.temperature; 0: the likeliest token each time
"""


def command(arguments: Sequence[str]) -> None:
    """`flux-ray generate ...`."""
    words = list(arguments)
    if not words or {"-h", "--help"} & set(words):
        return print(USAGE, end="")
    out = _taken_out(words)
    if len(words) < 2 or any("=" in word or word.startswith("-") for word in words[:2]):
        raise UserError("flux-ray generate MODEL FILE [-o OUT] [OPTION=VALUE ...]")
    model, file, *rest = words
    config = local_config(sampling_config_for(model, parsed(rest)))
    tokenizer = load_tokenizer(config.model.tokenizer or str(config.model.path))
    source = PromptSource.for_eval(config, tokenizer, prompts=file, context_length=config.rollout.max_model_len or 0)
    for warning in source.warnings():
        print(f"flux-ray: warning: {warning}", file=sys.stderr)
    with _written(out) as lines:
        asyncio.run(_generate(config, source, lines))
    if out is not None:
        print(f"{source.num_rows} prompts, responses in {out}")


def _taken_out(words: list[str]) -> Path | None:
    """The file after -o, which leaves the words."""
    place = next((i for i, word in enumerate(words) if word in ("-o", "--out")), None)
    if place is None:
        return None
    if place + 1 == len(words):
        raise UserError(f"{words[place]} OUT: the file that the responses go to")
    out = Path(words[place + 1]).expanduser()
    del words[place : place + 2]
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o {out}: there is no folder {out.absolute().parent}")
    return out


@contextlib.contextmanager
def _written(out: Path | None) -> Iterator[TextIO]:
    """Where lines go: a file that is there once it is whole, or the terminal."""
    if out is None:
        yield sys.stdout
        return
    unfinished = out.with_name(f".{out.name}.writing")
    try:
        with unfinished.open("w", encoding="utf-8") as lines:
            yield lines
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


async def _generate(config: PolicyGradientConfig, source: PromptSource, lines: TextIO) -> None:
    async with opened(config) as (engine, tokenizer):
        async for line in responses(config, engine, tokenizer, source):
            print(json.dumps(line, ensure_ascii=False), file=lines, flush=True)


async def responses(
    config: PolicyGradientConfig, engine: LocalEngine, tokenizer: Tokenizer, source: PromptSource,
) -> AsyncIterator[dict[str, object]]:
    """A line for each prompt, in order. The engine has at most rollout.max_num_seqs samples to do at once."""
    rollout, temperature = config.rollout, config.eval.temperature
    end_ids = stop_token_ids(config.model.path, tokenizer)
    waiting = asyncio.Semaphore(max(1, rollout.max_num_seqs // config.eval.num_samples))

    async def one(prompt: Prompt) -> dict[str, object]:
        limit = min(prompt.max_tokens or rollout.max_tokens, rollout.max_tokens)
        request = SamplingRequest(prompt.token_ids, prompt.num_samples, seed=prompt.seed, max_tokens=limit,
                                  temperature=rollout.temperature if temperature is None else temperature)
        async with waiting:
            completions = (await engine.generate(request)).completions
        texts = texts_of([c.token_ids for c in completions], tokenizer, end_ids=end_ids, skip_special_tokens=True)
        return {"row": prompt.row, "prompt": prompt.text, "responses": texts,
                "finish_reasons": [c.finish_reason for c in completions],
                "num_tokens": [c.num_tokens for c in completions]}

    tasks = [asyncio.ensure_future(one(source.prompt(uid))) for uid in range(source.num_rows)]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
