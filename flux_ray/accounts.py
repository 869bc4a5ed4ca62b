"""The accounts of a run's prompts: what became of each of them, step by step, in ledger.jsonl of the run's folder.

Takes:  an Account a step, as the loop gives it; the lines of the file.
Gives:  `as_line`; `audited`, which adds the lines up.
Knows:  a prompt is known by its uid, in the order in which prompts are drawn. Without rollouts a uid is a row's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Account:
    """What has become of prompts since the account before, and which are still under way.

    >>> Account(next_uid=10, pending=(8, 9), trained=(0, 1, 2, 3), dropped={"same_reward": (4, 7)})
    """

    next_uid: int  # that of the prompt that is drawn next
    pending: tuple[int, ...] = ()  # drawn, and neither trained nor dropped
    trained: tuple[int, ...] = ()
    dropped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by cause


def as_line(step: int, account: Account, **more: object) -> dict[str, object]:
    """A line of the file. `step`: the one that was trained, from 0; -1 in the line of a fresh run's start.

    >>> as_line(0, Account(next_uid=10, pending=(8, 9), trained=(0, 1, 2, 3)))
    {'step': 0, 'next_uid': 10, 'pending': [[8, 9]], 'trained': [[0, 3]], 'dropped': {}}
    """
    return {"step": step, "next_uid": account.next_uid, "pending": spans(account.pending),
            "trained": spans(account.trained),
            "dropped": {cause: spans(uids) for cause, uids in account.dropped.items()}, **more}


def spans(uids: Iterable[int]) -> list[list[int]]:
    """First and last of each run of numbers that follow one another.

    >>> spans([7, 2, 3, 1])
    [[1, 3], [7, 7]]
    """
    found: list[list[int]] = []
    for uid in sorted(uids):
        if found and found[-1][1] == uid - 1:
            found[-1][1] = uid
        else:
            found.append([uid, uid])
    return found


def uids_of(line_spans: Iterable[Sequence[int]]) -> Iterator[int]:
    for first, last in line_spans:
        yield from range(first, last + 1)


@dataclass
class Audit:
    """The sum of a run's lines. It is clean where every prompt that was drawn ended once, or is pending."""

    first_step: int = 0  # steps that were done before the first line
    num_steps: int = 0  # done in the end
    drawn: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    pending: int = 0
    lost: list[int] = field(default_factory=list)
    twice: list[int] = field(default_factory=list)  # ended more than once
    faults: list[str] = field(default_factory=list)  # of the file itself
    ended: str | None = None  # how the run ended; None: it goes on, or was killed

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.twice or self.faults)


def audited(lines: Sequence[Mapping[str, object]]) -> Audit:
    """Add up the lines of a ledger file, the oldest first."""
    audit, known = Audit(), set[int]()
    steps = [line for line in lines if "next_uid" in line]
    if not steps:
        audit.faults.append("there is no line in it")
        return audit
    opening, *later = steps
    known |= _uids(opening, "pending")
    next_uid = _int(opening, "next_uid")
    audit.first_step = audit.num_steps = _int(opening, "step") + 1
    audit.drawn = len(known)
    for line in later:
        if _int(line, "step") != audit.num_steps:
            audit.faults.append(f"step {audit.num_steps} is followed by step {_int(line, 'step')}")
        audit.num_steps = _int(line, "step") + 1
        drawn = range(next_uid, _int(line, "next_uid"))
        next_uid = max(next_uid, drawn.stop)
        known |= set(drawn)
        audit.drawn += len(drawn)
        for fate, uids in _fates(line):
            audit.twice += [uid for uid in uids if uid not in known]
            known -= set(uids)
            if fate == "trained":
                audit.trained += len(uids)
            else:
                audit.dropped[fate] += len(uids)
        pending = _uids(line, "pending")
        audit.lost += sorted(known - pending)
        audit.twice += sorted(pending - known)
        known = pending
    audit.pending = len(known)
    audit.ended = next((str(line["ended"]) for line in reversed(lines[-1:]) if "ended" in line), None)
    return audit


def _fates(line: Mapping[str, object]) -> Iterator[tuple[str, list[int]]]:
    yield "trained", list(uids_of(line["trained"]))  # type: ignore[arg-type]
    for cause, line_spans in line["dropped"].items():  # type: ignore[attr-defined]
        yield cause, list(uids_of(line_spans))


def _uids(line: Mapping[str, object], name: str) -> set[int]:
    return set(uids_of(line[name]))  # type: ignore[arg-type]


def _int(line: Mapping[str, object], name: str) -> int:
    value = line[name]
    assert isinstance(value, int), (name, value)
    return value
