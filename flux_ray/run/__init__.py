"""Runs a Config: `run(config) -> TrainingResult`, `evaluate(config) -> metrics`.

Takes:  a Config, from the command line or from Python; callbacks.
Gives:  a run folder with a trained model in it, or with an evaluation; `interrupt`, for a run in another thread.
Knows:  the life of a run: check, connect, place, build, loop, save. The user is told the first failure.
Never:  leaves a process behind, however the run ends; prints what a library prints.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flux_ray import machine, signals
from flux_ray.background import in_background
from flux_ray.cluster.group import ActorDied, ActorError
from flux_ray.config import Config
from flux_ray.errors import RunFailed, UserError
from flux_ray.home import ensure_home
from flux_ray.observability.callbacks import Callback
from flux_ray.run.result import TrainingResult

if TYPE_CHECKING:
    from flux_ray.cluster.groups import Cluster
    from flux_ray.cluster.plan import Plan, Role
    from flux_ray.cluster.supervisor import Supervisor
    from flux_ray.run.build import Build
    from flux_ray.run.prepare import Prepared
    from flux_ray.run.recorder import Recorder
    from flux_ray.run.restarts import Restarts
    from flux_ray.run.stopping import Stopping

#: What is done with actors that have been spawned: (prepared, build, recorder, stopping).
RunBody = Callable[["Prepared", "Build", "Recorder", "Stopping"], Awaitable[None]]

_running: dict[int, Callable[[], object]] = {}  # thread ► what asks the run in it to end

DEATH_SHOWS_S = 3.0  # Ray tells of an actor's death 1 to 2 s later; calls to the actor may fail at once


def run(config: Config, *, callbacks: Sequence[Callback] = ()) -> TrainingResult:
    """Train as the config says.

    UserError for a mistake in it, RunFailed for what broke, KeyboardInterrupt for Ctrl-C, SIGTERM and SIGHUP.
    """
    with signals.taken():
        recorder = _whole_life(config, _train, callbacks)
    history = tuple(recorder.history)
    return TrainingResult(recorder.folder.path, recorder.steps_done, history[-1] if history else {}, history)


def evaluate(config: Config, *, callbacks: Sequence[Callback] = ()) -> dict[str, float]:
    """eval/* of the prompts of eval.data under the policy as it is at model.path; nothing is trained. Raises as run."""
    with signals.taken():
        return _whole_life(config, _evaluate, callbacks).last_evaluation


def _whole_life(config: Config, body: RunBody, callbacks: Sequence[Callback]) -> Recorder:
    """Check, take the folder, do the work on live actors. Gives what was recorded."""
    ensure_home()
    machine.adapt()
    from flux_ray import run_dir
    from flux_ray.run.prepare import prepare

    prepared = prepare(run_dir.shown(config))
    prepared = dataclasses.replace(prepared, warnings=(*prepared.warnings, *_of_the_machine(config)))
    own_cpus = _own_cpus(prepared, trains=body is _train)
    config = run_dir.claim(prepared.config)
    assert config.run_dir is not None
    with run_dir.held(config.run_dir):
        return _recorded(dataclasses.replace(prepared, config=config), body, callbacks, own_cpus)


def _recorded(prepared: Prepared, body: RunBody, callbacks: Sequence[Callback], own_cpus: float) -> Recorder:
    """Do the work, in a run's folder that nobody else writes to. Gives what was recorded."""
    from flux_ray.accounts import Account
    from flux_ray.observability.page.report import at_end
    from flux_ray.observability.run_folder import LOG, RunFolder
    from flux_ray.observability.terminal import quiet
    from flux_ray.run.checkpoint import forget_newer
    from flux_ray.run.recorder import Recorder
    from flux_ray.run.stopping import told as stopped

    config = prepared.config
    folder = RunFolder(str(config.run_dir))
    prepared = _above_all_versions(prepared)
    folder.create(config, resume_step=prepared.start.step if config.resume else None)
    checkpoints = (folder.path / "checkpoints").resolve()
    if body is _train and prepared.checkpoint and prepared.checkpoint.parent == checkpoints:
        forget_newer(checkpoints, prepared.start.step)
    with quiet(folder.path / LOG, progress=config.observability.progress) as terminal:
        recorder = Recorder(
            config, folder=folder, terminal=terminal, callbacks=callbacks, steps_done=prepared.start.step
        )
        terminal.say(f"run folder {folder.path}")
        if body is _train:
            folder.open_ledger(prepared.start.step, Account(prepared.start.next_uid, prepared.start.unfinished))
        for note in prepared.notes:
            terminal.say(note)
        for warning in prepared.warnings:
            recorder.warn(warning)
        try:
            _lives(prepared, recorder, body, own_cpus)
        except BaseException as error:
            told = _told(error, folder.path / LOG)
            if isinstance(told, signals.Interrupted) and body is _train:
                told = stopped(told, checkpoints, begun=prepared.start.step, done=recorder.steps_done)
            how = "interrupted" if isinstance(told, KeyboardInterrupt) else "failed"
            if body is _train:
                folder.end_ledger(how)
                at_end(folder.path, how, say=terminal.say)
            recorder.ended(how, str(told))
            raise told from error
        recorder.ended("done")
        if body is _train:
            folder.end_ledger("done")
            at_end(folder.path, "done", say=terminal.say)
        terminal.say(f"done: model in {folder.model}" if body is _train else f"done: evaluation in {folder.path}")
    return recorder


def _lives(prepared: Prepared, recorder: Recorder, body: RunBody, own_cpus: float) -> None:
    """The work; after a fault again, from the last checkpoint. Then, whatever happened, every process of the run ends.
    """
    from flux_ray.cluster.groups import Cluster
    from flux_ray.run.restarts import Restarts

    restarts = Restarts(prepared, recorder)
    cluster: Cluster | None = None
    while True:
        cluster = cluster or Cluster(log_dir=recorder.folder.logs, plugins=list(prepared.config.plugins))
        goes_on = False  # with the actors that stand
        try:
            return asyncio.run(_live(prepared, body, recorder, cluster, restarts, own_cpus))
        except Exception as error:
            if body is not _train or signals.came():  # it was about to end anyway
                raise
            prepared = restarts.after(error)
            goes_on = cluster.stands
        finally:
            if not goes_on:
                _close(cluster)
                cluster = None


def _close(cluster: Cluster) -> None:
    with signals.asks(lambda: None, kill=cluster.kill):
        asyncio.run(cluster.close())


def _above_all_versions(prepared: Prepared) -> Prepared:
    """A resumed run publishes above all versions of the earlier one, those after its checkpoint too."""
    from flux_ray import run_dir
    from flux_ray.observability.run_folder import METRICS, RunFolder, read_lines

    if prepared.checkpoint is None:
        return prepared
    before = RunFolder(run_dir.run_of(str(prepared.config.resume)))
    published = [int(line.get("driver/version", -1)) for line in read_lines(before.path / METRICS)]
    version = max([prepared.start.version, *published])
    return dataclasses.replace(prepared, start=dataclasses.replace(prepared.start, version=version))


def _of_the_machine(config: Config) -> list[str]:
    """What is to be said of it before a Ray of the run's own starts. UserError where it couldn't."""
    from flux_ray.cluster.groups import Cluster

    if Cluster.wanted_address(config.cluster.address):
        return []
    machine.refuse_own_ray()
    small = machine.shared_memory_warning()
    return [small] if small else []


def _own_cpus(prepared: Prepared, *, trains: bool) -> float:
    """CPUs that a Ray of the run's own declares: as many as the plan counts, for actors share the cores of the machine.

    UserError for a plan that can't be placed on this machine. 0 where a running cluster is joined: it is asked later.
    """
    from flux_ray.cluster.groups import Cluster

    if Cluster.wanted_address(prepared.config.cluster.address):
        return 0.0
    return _plan(prepared, gpus=_visible_gpus(prepared.config), trains=trains).total["CPU"]


def _plan(prepared: Prepared, *, gpus: int, trains: bool) -> Plan:
    """What is placed where, on a cluster of that many GPUs. UserError for what can't be placed."""
    from flux_ray.cluster.plan import make_plan
    from flux_ray.run.build import check_engines

    plan = make_plan(prepared.config, cluster_gpus=gpus, needs_reference=prepared.needs_reference, trains=trains)
    check_engines(prepared, plan)
    return plan


async def _live(prepared: Prepared, body: RunBody, recorder: Recorder, cluster: Cluster, restarts: Restarts,
                own_cpus: float) -> None:
    """Connect and place, unless actors stand there already; do the work.

    Where ranks alone were lost, the other actors are brought to where the next life can go on with them.
    """
    from flux_ray.cluster.stacks import write_stacks
    from flux_ray.cluster.supervisor import Supervisor
    from flux_ray.run.build import Build
    from flux_ray.run.restarts import first_cause

    config = prepared.config
    wish, build, leaves_others = _interruptible(), None, False
    supervisor = Supervisor(start_deadline_s=config.cluster.start_deadline_s, epoch=cluster.epoch)
    supervisor.warn = recorder.warn
    supervisor.look_at = lambda actor: write_stacks([recorder.folder.logs / f"{actor.role}-{actor.index}.log"])
    watching = None
    with signals.asks(wish.ask, kill=cluster.kill):
        try:
            if not cluster.stands:
                cluster.connect(config.cluster.address, cpus=own_cpus, gpus=_visible_gpus(config),
                                allow_open=config.cluster.allow_open,
                                server_deadline_s=config.cluster.server_deadline_s)
                signals.again()  # connecting puts a handler of Ray's own in the place of ours
            watching = in_background(_watch(cluster, supervisor), supervisor.fail)
            plan = _plan(prepared, gpus=cluster.num_gpus(), trains=body is _train)
            if not cluster.stands:
                await cluster.place(plan, deadline_s=config.cluster.placement_deadline_s)
            build = Build(prepared, cluster, plan, supervisor)
            _say_what_starts(prepared, plan, build.starting, recorder)
            await _unless_one_dies(supervisor, body(prepared, build, recorder, wish))
        except Exception as error:
            if isinstance(first_cause(error), TimeoutError):  # somebody is stuck: where?
                await asyncio.to_thread(write_stacks, list(recorder.folder.logs.glob("*.log")))
            leaves_others = restarts.leaves_others(error) and supervisor.is_whole
            raise
        finally:
            wish.closing()
            if watching is not None:
                watching.cancel()
            supervisor.close()
            if build is not None and leaves_others:
                await build.lay_down()


def _say_what_starts(prepared: Prepared, plan: Plan, starting: Sequence[Role], recorder: Recorder) -> None:
    from flux_ray.model import slow_dtype

    others = "; the other actors go on" if len(starting) < len(plan.roles) else ""
    recorder.terminal.say("starting " + ", ".join(f"{role.count} {role.name}" for role in starting)
                          + f" on {plan.device}{others}")
    slow = slow_dtype(prepared.config.model.dtype, plan.device)
    if slow and not recorder.was_ready:
        recorder.warn(slow)


async def _watch(cluster: Cluster, supervisor: Supervisor) -> None:
    supervisor.fail(await cluster.death())


async def _train(prepared: Prepared, build: Build, recorder: Recorder, wish: Stopping) -> None:
    """Build what goes with the data, run its loop, save the model."""
    from flux_ray.run.saving import save_models
    from flux_ray.run.stopping import MODEL_S
    from flux_ray.run.training import Training

    loop = await build.loop(prepared.task, recorder)
    recorder.ready()
    await Training(prepared.config, loop, recorder, trained=build.trained, progress=build.supervisor.progress,
                   stopping=wish).run()
    with wish.within(MODEL_S):
        await save_models(recorder.folder.model, build.trained, deadline_s=prepared.config.train.deadline_s)


async def _evaluate(prepared: Prepared, build: Build, recorder: Recorder, wish: Stopping) -> None:
    """Once over eval.data: by engines and reward workers alone, or by ranks that train nothing."""
    evaluation = await build.evaluation(prepared.task, recorder)
    recorder.terminal.say("ready")
    async with asyncio.TaskGroup() as tasks:
        await evaluation.begin(tasks)
        evaluated = await evaluation.evaluate()
        evaluation.end()
    if evaluated is not None:
        recorder.evaluation(0, *evaluated)
        recorder.answers(evaluated[1])


async def _unless_one_dies(supervisor: Supervisor, work: Awaitable[None]) -> None:
    """Do the work. Where an actor's death ends the run, raise that, and not what the death broke elsewhere."""
    from flux_ray.run.restarts import first_cause
    from flux_ray.run.stopping import Stopped

    working, death = asyncio.ensure_future(work), supervisor.failure
    either: set[asyncio.Future[None] | asyncio.Future[Exception]] = {working, death}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        error = working.exception() if working.done() else None
        if error is not None and isinstance(first_cause(error), Stopped):
            raise error
        if working.done() and (error is None or isinstance(error, UserError)):
            return working.result()
        await asyncio.wait(either, timeout=DEATH_SHOWS_S)
        if death.done() and not (working.done() and isinstance(working.exception(), ActorDied)):
            raise death.result() from error
        working.result()
    finally:
        working.cancel()
        await asyncio.wait({working})


def _visible_gpus(config: Config) -> int:
    """GPUs of this machine, for a Ray of the run's own; 0 without asking where the config says CPU."""
    if config.cluster.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def _interruptible() -> Stopping:
    """From now on `interrupt` ends the run in this thread, which is this task."""
    from flux_ray.run.stopping import Stopping

    task = asyncio.current_task()
    assert task is not None
    wish = Stopping(task)
    _running[threading.get_ident()] = wish.ask
    task.add_done_callback(lambda _: _running.pop(threading.get_ident(), None))
    return wish


def interrupt(thread: threading.Thread) -> None:
    """End the run in that thread, as Ctrl-C ends one in the main thread.

    Nothing where no run is there, or the second time: the run is ending its processes then.
    """
    ask = _running.pop(thread.ident or 0, None)
    if ask is not None:
        ask()


def _told(error: BaseException, log: Path) -> BaseException:
    """The first cause of a failure as the user is told it."""
    import logging

    from flux_ray.run.restarts import first_cause
    from flux_ray.run.stopping import Stopped

    logging.getLogger(__name__).error("the run failed", exc_info=error)
    error = first_cause(error)
    if isinstance(error, (UserError, KeyboardInterrupt)):
        return error
    if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # so Ray answers one while it starts
        return signals.Interrupted(signal.SIGTERM)
    if isinstance(error, (asyncio.CancelledError, Stopped)):
        return signals.Interrupted(signals.first())
    text = " ".join(str(error).split()) or type(error).__name__  # a library's many lines are in the log
    known = isinstance(error, (RuntimeError, TimeoutError))
    if isinstance(error, ActorError) and error.log_file:
        log = error.log_file
    return RunFailed(f"{text if known else f'{type(error).__name__}: {text}'} (log: {log})")


__all__ = ["TrainingResult", "evaluate", "interrupt", "run"]
