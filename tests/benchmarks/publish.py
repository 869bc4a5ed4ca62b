"""How soon new weights are served, and how long running requests wait for them: 240 MB, two engines.

Takes:  a Session.
Gives:  `publish`: a latency and a stall for each weights.staging that there is; the part `run`.
Knows:  an engine serves a version when a running request has its first token of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from flux_ray.config import WeightsConfig
from tests.benchmarks import inside
from tests.benchmarks.figures import Measured
from tests.benchmarks.session import Session
from tests.benchmarks.work import PROMPT_TOKENS, Phase, options

#: Of a step: each engine has one prompt, and generates the next step's when an update comes.
PROMPTS, SAMPLES, TOKENS, STALENESS = 2, 2, 96, 1
WARM_UP, FEWEST, QUICK = 2, 5, 3  # steps
AFTER_UPDATE = ("recompute", "keep")  # of rollout.kv_after_update: what runs prefills again, or goes on with its KV


def publish(session: Session) -> list[Measured]:
    results = []
    for staging in stagings()[-1 if session.quick else 0:]:
        for kv in AFTER_UPDATE[: 1 if session.quick else None]:
            gave = session.part("publish", steps=WARM_UP + (QUICK if session.quick else max(FEWEST, 2 * session.runs)),
                                **{"weights.staging": staging, "rollout.kv_after_update": kv})
            about = {"staging": staging, "kv_after_update": kv, "megabytes": 240, "engines": 2, "dtype": "float32"}
            ending = f"_{staging}" + "_keep" * (kv == "keep")
            results.append(Measured.of(f"publish{ending}", gave["served_s"], unit="s", goal="<= 1.0", **about))
            results.append(Measured.of(f"publish_stall{ending}", gave["stalled_s"], unit="s", goal="<= 0.4",
                                       longest=max(gave["stalled_s"]), **about))
    return results


def stagings() -> list[str]:
    """What weights.staging offers on CPU; auto is one of them."""
    (found,) = [f.metadata["choices"] for f in dataclasses.fields(WeightsConfig) if f.name == "staging"]
    return [name for name in found if name not in ("auto", "device")]


def run(folder: Path, work: Path, *, steps: int, **more: Any) -> dict[str, list[float]]:
    """For each version after the warm-up: seconds from the optimizer step until all engines serve it, and the longest
    that a running request waited between its last token of the old version and its first of the new."""
    from flux_ray.config import from_dict
    from flux_ray.driver import run as train

    rows = [{"prompt": str(10 ** (PROMPT_TOKENS - 1) + i), "lengths": [TOKENS] * SAMPLES}
            for i in range(PROMPTS * (steps + 4))]
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phase = Phase("publish", [TOKENS] * PROMPTS * SAMPLES, 0, steps)
    train(from_dict(options(folder, dtype="float32", phases=[phase]) | {
        "model.path": str(folder / "60M"), "data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"),
        "plugins": [inside.__file__], "rollout.function": f"{inside.__file__}:watched", "rollout.num_engines": 2,
        "rollout.group_size": SAMPLES, "batch.prompts_per_step": PROMPTS, "driver.max_staleness": STALENESS} | more))
    updated = [json.loads(line)["at_s"] for line in (work / "trainer-0.jsonl").read_text().splitlines()]
    engines = [[json.loads(line) for line in (work / f"engine-{i}.jsonl").read_text().splitlines()]
               for i in range(more.get("rollout.num_engines", 2))]
    served, stalled = [], []
    for version in range(WARM_UP, steps):
        firsts = [first_token_s(requests, version) for requests in engines]
        if all(first is not None for first in firsts):
            served.append(max(firsts) - updated[version - 1])  # type: ignore[type-var, operator]
        stalled += [max(waited) for waited in [waits_s(itertools.chain(*engines), version)] if waited]
    if not served or not stalled:
        raise RuntimeError("no request ran while an update came: the trainer was slower than the engines")
    return {"served_s": served, "stalled_s": stalled}


def first_token_s(requests: Any, version: int) -> float | None:
    """When a request that ran before had its first token of this version; None where none ran: an engine without one
    waits for the driver's next prompt and not for weights."""
    times = [at_s for request in requests if request["versions"][0] < version
             for at_s, v in zip(request["times_s"], request["versions"], strict=True) if v == version]
    return min(times, default=None)


def waits_s(requests: Any, version: int) -> list[float]:
    """Of each request that went on under this version: from its last token of the one before to the next."""
    waits = []
    for request in requests:
        tokens = zip(request["times_s"], request["versions"], strict=True)
        waits += [b_s - a_s for (a_s, a), (b_s, b) in itertools.pairwise(tokens) if a != b == version]
    return waits
