"""Figures of a whole step: against its bare parts, against itself, and how much of what is forwarded is of use.

Takes:  a Session.
Gives:  `sync_ratio`, `async_ratio`, `async_gain`, `padding`: lists of Measured.
"""

from __future__ import annotations

import dataclasses
import statistics

from benchmarks.figures import Measured
from benchmarks.session import EQUAL, FULL_TOKENS, RUNS, UNEQUAL, Session
from benchmarks.work import Phase, log_normal

#: Phase ► ending of a figure's name, goal of async_gain.
OF_PHASE = {EQUAL: ("", ">= 0.9"), UNEQUAL: ("_sigma_0.8", ">= 0.85")}
STAGES = ("driver/wait_s", "train/step_s", "weights/publish_s")


def stages(session: Session, run: str, phase: str) -> dict[str, float]:
    """Where a step's time goes, medians in seconds."""
    steps = session.ours(run)[phase]["steps"]
    return {name: round(statistics.median(step[name] for step in steps), 3) for name in STAGES}


def sync_ratio(session: Session) -> list[Measured]:
    session, results = session.of_ratios(), []
    for phase, (generation_s, training_s) in session.floors().items():
        values = [step_s / (generation_s + training_s) for step_s in session.step_s("synchronous", phase)]
        results.append(Measured.of(
            f"sync_ratio{OF_PHASE[phase][0]}", values, unit="x", goal="<= 1.08" if phase == EQUAL else None,
            generation_s=round(generation_s, 3), training_s=round(training_s, 3),
            step_s=round(statistics.median(session.step_s("synchronous", phase)), 3),
            stages=stages(session, "synchronous", phase)))
    return results


def async_ratio(session: Session) -> list[Measured]:
    """Against each bare part alone; for orientation, against both while the other runs on the other core."""
    session, results = session.of_ratios(), []
    around = session.floors("asynchronous")
    beside = {} if session.quick else session.floors_beside()
    for phase, floors in around.items():
        steps_s = session.step_s("asynchronous", phase)
        results.append(Measured.of(
            f"async_ratio{OF_PHASE[phase][0]}", [step_s / max(floors) for step_s in steps_s], unit="x",
            goal="<= 1.12" if phase == EQUAL else None, generation_s=round(floors[0], 3),
            training_s=round(floors[1], 3), step_s=round(statistics.median(steps_s), 3),
            stages=stages(session, "asynchronous", phase)))
        if phase in beside:
            generation_s, training_s = beside[phase]
            results.append(Measured.of(
                f"async_ratio_beside{OF_PHASE[phase][0]}", [step_s / max(beside[phase]) for step_s in steps_s],
                unit="x", generation_s=round(generation_s, 3), training_s=round(training_s, 3)))
    return results


def async_gain(session: Session) -> list[Measured]:
    """Against its own synchronous run; for orientation, where it isn't quick, against one on both cores.

    Synchronous / asynchronous over (g + t) / max(g, t) is the one's ratio to g + t over the other's to max(g, t): each
    by the bare parts around it, so that what changed between them isn't taken for gain or loss.
    """
    session, results = session.of_ratios(), []
    around_synchronous = session.floors("synchronous")
    for phase, floors in session.floors("asynchronous").items():
        ending, goal = OF_PHASE[phase]
        synchronous_s = statistics.median(session.step_s("synchronous", phase))
        sync_ratio = synchronous_s / sum(around_synchronous[phase])
        steps_s = session.step_s("asynchronous", phase)
        results.append(Measured.of(
            f"async_gain{ending}", [sync_ratio / (s / max(floors)) for s in steps_s], unit="of ideal", goal=goal,
            synchronous_s=round(synchronous_s, 3), g_and_t_s=round(sum(around_synchronous[phase]), 3),
            larger_s=round(max(floors), 3)))
        if not session.quick:
            both_s = statistics.median(session.step_s("both_cores", phase))
            results.append(Measured.of(f"async_gain_over_both_cores{ending}", [both_s / s for s in steps_s], unit="x",
                                       both_cores_s=round(both_s, 3), stages=stages(session, "both_cores", phase)))
    return results


def padding(session: Session) -> list[Measured]:
    """Of two ranks, so that what keeps them in step counts too: tokens forwarded for nothing / tokens forwarded. One
    engine, for which it changes nothing.

    Whole lengths, be it quick or not: short ones are padded more. The model's size changes nothing.
    """
    lengths = log_normal(FULL_TOKENS)
    phase = dataclasses.asdict(Phase(UNEQUAL, lengths, warm_up=0, runs=session.runs))
    more = RUNS["both_cores"] | {"model.path": str(session.folder / "small"), "cores": {},
                                "rollout.num_engines": 1, "rollout.kv_cache_gib": 0.25}
    ranks = session.part("ours", phases=[phase], dtype=session.dtype, **more)[UNEQUAL]["ranks"]
    shares = []
    for of_step in zip(*ranks, strict=True):
        forwarded, used = (sum(note[name] for note in of_step) for name in ("forwarded", "used"))
        shares.append(100 * (1 - used / forwarded))
    return [Measured.of("padding", shares, unit="%", goal="<= 5",
                        micro_batches=[notes[0]["micro_batches"] for notes in ranks])]
