"""A step's time line: the one line of it, and the trace that Chrome and Perfetto read."""

from __future__ import annotations

import itertools

import pytest

from flux_ray.observability.spans import GENERATE, WAIT, Phases, Span, chrome_trace, where_time_went

pytestmark = pytest.mark.unit


def groups(*ends_s: float) -> list[Span]:
    return [Span(GENERATE, f"engine {i % 2}", 0.0, end_s) for i, end_s in enumerate(ends_s)]


def step(*, waits_s: float, trains_s: float = 1.0) -> list[Span]:
    return [Span(WAIT, "driver", 0.0, waits_s), Span("train", "driver", waits_s, waits_s + trains_s)]


@pytest.mark.parametrize(("spans", "line"), [
    ([*step(waits_s=4.0), *groups(1.0, 1.0, 1.0, 1.0, 1.0, 4.0)], "60 % generation tail, engine 1"),
    ([*step(waits_s=4.0), *groups(3.0, 3.2, 3.4, 3.6, 4.0)], "80 % generation"),
    ([*step(waits_s=9.0), *groups(2.0)], "70 % scoring of the last groups"),
    ([*step(waits_s=1.0, trains_s=4.0), *groups(0.5)], "80 % train"),
    (step(waits_s=0.0, trains_s=2.0), "100 % train"),
    ([], ""),
])
def test_the_largest_part_of_a_step(spans, line):
    assert where_time_went(spans) == line


def test_groups_of_an_earlier_step_count_for_the_wait_alone():
    """They began before the step did: an asynchronous run."""
    spans = [Span(WAIT, "driver", 100.0, 101.0), Span("train", "driver", 101.0, 104.0), *groups(90.0, 100.5)]
    assert where_time_went(spans) == "75 % train"


def test_phases_are_timed_where_they_fail_too():
    now = iter([1.0, 3.0])
    phases = Phases(lambda: next(now))
    with pytest.raises(KeyError), phases.during("train"):
        raise KeyError
    assert phases.spans == [Span("train", "driver", 1.0, 3.0)]


def test_the_trace_has_an_actor_a_process_and_no_overlap_in_a_lane():
    trace = chrome_trace([*step(waits_s=4.0), *groups(1.0, 2.0, 3.0, 4.0)], step=41)
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == ["driver", "engine 0", "engine 1"]
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, lanes.values())) == 6
    for spans in lanes.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert trace["otherData"] == {"step": 41, "most": where_time_went([*step(waits_s=4.0), *groups(1, 2, 3, 4)])}
