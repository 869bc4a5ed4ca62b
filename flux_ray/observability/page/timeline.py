"""The time line of a step, from a trace of Chrome's events.

Takes:  RUN/traces/step-N.json.
Gives:  `timeline`: spans in lanes, one lane for each thread of an actor.
Knows:  complete events (ph=X) and pairs of begin and end (B, E); names of processes and threads are in others (M).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from flux_ray.errors import UserError
from flux_ray.observability.page.runs import TRACES, Record, Run

MOST_SPANS = 5_000  # the longest stay


def timeline(run: Run, step: int) -> Record:
    """`lanes`: {name, spans}; a span: name, begin and length in ms, how deep it lies in others, its `args`.

    UserError where there is no such file, or it can't be read.
    """
    file = run.path / TRACES / f"step-{step:06d}.json"
    try:
        trace = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"step {step} has no time line: there is no {TRACES}/{file.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{TRACES}/{file.name} can't be read: {error}") from None
    events = trace.get("traceEvents", []) if isinstance(trace, dict) else trace
    events = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    spans = sorted(_spans(events), key=lambda span: -span["ms"])
    kept = spans[:MOST_SPANS]
    begin = min((span["begin_ms"] for span in kept), default=0.0)
    names = _names(events)
    lanes: dict[tuple[object, object], list[Record]] = {}
    for span in sorted(kept, key=lambda span: (span["begin_ms"], -span["ms"])):
        lane = lanes.setdefault(span.pop("lane"), [])
        span["begin_ms"] -= begin
        span["depth"] = _depth(lane, span)
        lane.append(span)
    named = [{"name": _lane_name(lane, names), "spans": inside} for lane, inside in lanes.items()]
    left_out = f"the {MOST_SPANS} longest of {len(spans)} spans are shown" if len(spans) > len(kept) else ""
    return {"step": step, "file": str(file), "note": left_out, "lanes": sorted(named, key=lambda lane: lane["name"])}


def _spans(events: Iterable[Record]) -> Iterable[Record]:
    begun: dict[tuple[object, object], list[Record]] = {}
    for event in events:
        lane, kind = (event.get("pid"), event.get("tid")), event.get("ph")
        if kind == "X":
            yield _span(lane, event, float(event.get("dur", 0)))
        elif kind == "B":
            begun.setdefault(lane, []).append(event)
        elif kind == "E" and begun.get(lane):
            first = begun[lane].pop()
            yield _span(lane, first, float(event["ts"]) - float(first["ts"]))


def _span(lane: tuple[object, object], event: Record, us: float) -> Record:
    args = event.get("args")
    return {"lane": lane, "name": str(event.get("name", "")), "begin_ms": float(event.get("ts", 0)) / 1000,
            "ms": us / 1000, "args": args if isinstance(args, dict) else {}}


def _names(events: Iterable[Record]) -> dict[tuple[object, object], str]:
    """Of (process, None) and of (process, thread)."""
    found = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name"):
            thread = event.get("tid") if event["name"] == "thread_name" else None
            found[event.get("pid"), thread] = str((event.get("args") or {}).get("name", ""))
    return found


def _lane_name(lane: tuple[object, object], names: dict[tuple[object, object], str]) -> str:
    process, thread = lane
    return " · ".join([names.get((process, None), str(process)), names.get(lane, str(thread))])


def _depth(lane: list[Record], span: Record) -> int:
    """Below the spans of its lane that have not ended when it begins: the least depth that is free."""
    taken = {other["depth"] for other in lane if other["begin_ms"] + other["ms"] > span["begin_ms"] + 1e-9}
    return next(depth for depth in range(len(taken) + 1) if depth not in taken)
