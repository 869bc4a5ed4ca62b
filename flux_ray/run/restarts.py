"""What a run does when something of it died that nobody can replace: it goes on from its last checkpoint.

Takes:  what ended a life of the run; the checkpoints in its folder.
Gives:  `Restarts.after`: what the next life begins with; `leaves_others`: whether actors go on in it.
Knows:  a life is one group of training ranks, from its start to its end. Where it alone was lost, all other actors go
        on in the next life; else they are built anew as well. The driver's process stays.
        A synchronous run that is restarted ends with the weights of one that was never disturbed.
        Numbers that are not finite, step after step, are a fault the first time.
Never:  restarts for a mistake of the user's, or again and again at the same step.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from flux_ray.cluster.group import ActorDied, ActorError, ActorLate
from flux_ray.cluster.plan import CRITIC, ENGINE, REFERENCE, REWARD_MODEL, TRAINER
from flux_ray.observability.run_folder import METRICS, read_lines
from flux_ray.run import checkpoint as saved
from flux_ray.run.numbers import NumbersWentWrong
from flux_ray.run.prepare import Prepared
from flux_ray.run.recorder import Recorder

OURS = (TRAINER, CRITIC, ENGINE, REFERENCE, REWARD_MODEL)  # roles that run no code of the user's
#: What a peer of a dead or silent process raises.
BROKEN_OFF = ("CoreDied", "TimeoutError", "ActorLate", "ConnectionError", "ConnectionResetError", "DistBackendError",
              "DistNetworkError")
BROKEN_OFF_TEXT = re.compile(r"[Cc]onnection (closed|reset|refused)|[Tt]imed out|[Bb]roken pipe")


class Restarts:
    """Of one run, in one process."""

    def __init__(self, first: Prepared, recorder: Recorder) -> None:
        self._first, self._recorder = first, recorder
        self._furthest, self._in_a_row = first.start.step, 0
        self._numbers_went_wrong = False  # before

    def leaves_others(self, error: BaseException) -> bool:
        """Whether a life that this ended lost its ranks alone. Not twice at the same step: others may be to blame."""
        recorder = self._recorder
        gets_further = recorder.steps_done > self._furthest or not self._in_a_row
        return recorder.was_ready and gets_further and is_of_ranks(first_cause(error))

    def after(self, error: BaseException) -> Prepared:
        """What the next life begins with. Raises `error` where the run is to end."""
        recorder, most = self._recorder, self._first.config.cluster.max_restarts
        gets_further = recorder.steps_done > self._furthest
        self._furthest = max(self._furthest, recorder.steps_done)
        self._in_a_row = 1 if gets_further else self._in_a_row + 1
        cause = first_cause(error)
        wrong_again = isinstance(cause, NumbersWentWrong) and self._numbers_went_wrong
        self._numbers_went_wrong |= isinstance(cause, NumbersWentWrong)
        if not is_fault(cause) or wrong_again or not recorder.was_ready or self._in_a_row > most:
            raise error
        logging.getLogger(__name__).error("the run goes on after this", exc_info=error)
        prepared = self._from_last_checkpoint()
        recorder.go_back(prepared.start.step)
        of = f" ({self._in_a_row} of {most} without getting further)" if self._in_a_row > 1 else ""
        recorder.warn(f"{' '.join(str(cause).split())}: going on from step {prepared.start.step}{of}")
        return prepared

    def _from_last_checkpoint(self) -> Prepared:
        """Of this process or of those before it; without one, from where this process began."""
        first, folder = self._first, self._recorder.folder
        found, passed_over = saved.newest_whole(folder.checkpoints)
        for line in passed_over:
            self._recorder.warn(line)
        published = [int(line.get("driver/version", -1)) for line in read_lines(folder.path / METRICS)]
        start, checkpoint = first.start, first.checkpoint
        if found is not None:
            start, checkpoint = saved.load(found), found
        # One more may have been published since the last line.
        version = max([start.version, *(version + 1 for version in published)])
        return replace(first, start=replace(start, version=version), checkpoint=checkpoint)


def first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def is_of_ranks(cause: BaseException) -> bool:
    """Whether it says nothing against any actor but those that train."""
    of_ranks = isinstance(cause, (ActorError, ActorLate)) and cause.role in (TRAINER, CRITIC)
    return of_ranks or isinstance(cause, NumbersWentWrong)


def is_fault(cause: BaseException) -> bool:
    """Whether something died or fell silent that may live the next time."""
    if isinstance(cause, (ActorDied, NumbersWentWrong)):
        return True
    if isinstance(cause, ActorError):
        broke_off = cause.raised in BROKEN_OFF or bool(BROKEN_OFF_TEXT.search(str(cause)))
        return cause.role in OURS and broke_off
    return isinstance(cause, TimeoutError)
