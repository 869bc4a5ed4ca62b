"""Rewards that aren't ours, and those that need a main thread: child processes call them.

Takes:  the config, where and with which variables users' code runs; a call with its arguments.
Gives:  SandboxedRewards: signatures, calls with a deadline; `ask_signatures`, before anything of a run has started.
Knows:  plain functions share one child, in which they take turns, and async ones another, side by side on one loop.
        A call's time counts from its own turn, without imports. A late call ends its child; the others in it start
        again in a new one.
Never:  blames a call for the end of a child that it shared with others.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from flux_ray.cluster.functions import pack
from flux_ray.cluster.group import CallFailed
from flux_ray.config import PolicyGradientConfig, RewardConfig
from flux_ray.errors import UserError
from flux_ray.held_folder import remove_left_over
from flux_ray.plugins import HANDED_OVER, load_function
from flux_ray.reward.child import Call, Told
from flux_ray.reward.registry import Signature, unknown_here
from flux_ray.sandbox import SCRATCH, Child, ChildEnded, Entry, Limits, warm_up

KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
         inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)  # by their numbers
PRELOADED = ("flux_ray.reward.child",)
KIB, GIB = 1 << 10, 1 << 30

#: In what a call raises: its process has nothing left, and so would fail the next call as well.
USED_UP = ("MemoryError", "allocate memory", "Too many open files", "Resource temporarily unavailable")


class Late(Exception):
    """The deadline passed. Not TimeoutError: a function may raise that by itself."""


@dataclass(frozen=True)
class Surroundings:
    """Where users' rewards run, as in a script that is started by hand: its folder, and variables by name.

    They find the folder's files there, but work in a temporary one.
    """

    folder: str | None = None
    env: dict[str, str] = field(default_factory=dict, repr=False)
    functions: dict[str, bytes] = field(default_factory=dict, repr=False)  # those that no process can import, packed

    @classmethod
    def here(cls, reward: RewardConfig) -> Surroundings:
        """This process's. UserError where a variable that reward.env names isn't set."""
        for name in reward.env:
            if name not in os.environ:
                raise UserError(f"reward.env: the environment has no variable {name!r}; set it, or leave it out")
        functions = {name: pack(load_function(name, option="reward.functions"), name=name)
                     for name in reward.functions if name.startswith(HANDED_OVER)}
        return cls(str(Path.cwd()), {name: os.environ[name] for name in reward.env}, functions)


class SandboxedRewards:
    """Children start at the first call."""

    def __init__(self, config: PolicyGradientConfig, surroundings: Surroundings) -> None:
        self._deadline_s, self._start_deadline_s = config.reward.deadline_s, config.cluster.start_deadline_s
        self._references = unknown_here(config.reward)
        self._limits = limits_of(config.reward)
        self._entry = Entry("flux_ray.reward.child:make", {
            "references": self._references, "plugins": list(config.plugins), "folder": surroundings.folder,
            "env": surroundings.env, "functions": surroundings.functions, "run_dir": config.run_dir})
        self._children: dict[bool, Child] = {}  # by whether its functions are async
        self._has_cleared = False
        self._starting = asyncio.Lock()
        self._alone = asyncio.Lock()
        self._given_up: WeakSet[Child] = WeakSet()  # ended for one call, which was late or had used up what there is
        self._imported: WeakKeyDictionary[Child, set[str]] = WeakKeyDictionary()  # functions
        self._going_on: set[asyncio.Task[Any]] = set()  # calls that nobody waits for any more

    async def signatures(self) -> dict[str, Signature]:
        """How the functions that only a child imports are called. UserError where one can't be imported or called."""
        if not self._references:
            return {}
        child = await self._shared(False)
        try:
            async with asyncio.timeout(self._start_deadline_s):
                told = await child.call(None, in_main_thread=True)
        except TimeoutError:
            raise UserError(f"reward.functions={self._references}: importing them took longer than "
                            f"cluster.start_deadline_s={self._start_deadline_s:g} s") from None
        except ChildEnded as error:
            raise UserError(f"reward.functions={self._references}: while they were imported, {error}") from error
        signatures = {reference: _signature(**one) for reference, one in told.items()}
        self._imported[child] = set(told)
        if all(signature.is_async for signature in signatures.values()):
            self._children[True] = self._children.pop(False)
        return signatures

    async def call(self, payload: Call, *, is_async: bool) -> Told:
        """What the child tells. Raises Late; CallFailed or UserError for what the function raises; ChildEnded."""
        while True:
            child, began = await self._shared(is_async), asyncio.Event()
            try:
                return await self._kept(child, payload, began)
            except ChildEnded as error:
                if began.is_set() and child not in self._given_up:
                    first = error
                    break
        async with self._alone:
            child = await self._new()
            try:
                return await self._kept(child, payload, asyncio.Event())
            except ChildEnded as error:
                raise first from error
            finally:
                child.kill("its call has ended")

    async def _kept(self, child: Child, payload: Call, began: asyncio.Event) -> Told:
        """A call that has begun is watched to its end though nobody waits for it: it may hold up the others."""
        calling = asyncio.ensure_future(self._within_deadline(child, payload, began))
        try:
            return await asyncio.shield(calling)
        except asyncio.CancelledError:
            if began.is_set() and not calling.done():
                self._going_on.add(calling)
                calling.add_done_callback(self._forget)
            else:
                calling.cancel()
            raise

    async def _within_deadline(self, child: Child, payload: Call, began: asyncio.Event) -> Told:
        loop = asyncio.get_running_loop()
        await self._import(child, payload["reference"], began)
        try:
            async with asyncio.timeout(None) as limit:
                def begin() -> None:
                    began.set()
                    limit.reschedule(loop.time() + self._deadline_s)

                return await child.call(payload, in_main_thread=True, began=begin)
        except TimeoutError:
            self._given_up.add(child)
            child.kill(f"a call in it took longer than reward.deadline_s={self._deadline_s:g} s")
            raise Late from None
        except CallFailed as error:
            if any(sign in f"{error.name}: {error.text}" for sign in USED_UP):
                self._given_up.add(child)
                child.kill(f"a call in it raised {error.name}: {error.text}")
            raise

    async def _import(self, child: Child, reference: str, began: asyncio.Event) -> None:
        """Have the child import the function. That is no time of a call, which may be the first in a new child."""
        if reference in self._imported.setdefault(child, set()):
            return
        began.set()  # who ends the child now is this call
        try:
            async with asyncio.timeout(self._start_deadline_s):
                await child.call(reference, in_main_thread=True)
        except TimeoutError:
            limit = f"cluster.start_deadline_s={self._start_deadline_s:g} s"
            child.kill(f"importing {reference} took longer than {limit}")
            raise ChildEnded(child.why_ended) from None
        began.clear()
        self._imported[child].add(reference)

    def _forget(self, calling: asyncio.Task[Any]) -> None:
        self._going_on.discard(calling)
        if not calling.cancelled():
            calling.exception()

    async def _shared(self, is_async: bool) -> Child:
        async with self._starting:
            child = self._children.get(is_async)
            if child is None or child.ended:
                child = self._children[is_async] = await self._new()
            return child

    async def _new(self) -> Child:
        await asyncio.to_thread(warm_up, PRELOADED)
        if not self._has_cleared:
            self._has_cleared = True
            await asyncio.to_thread(remove_left_over, SCRATCH)
        return await Child.start(self._entry, deadline_s=self._start_deadline_s, limits=self._limits)

    def close(self) -> None:
        for child in self._children.values():
            child.kill("the run has ended")


def limits_of(reward: RewardConfig) -> Limits:
    def counted(amount: float | None, unit: int) -> int | None:
        return None if amount is None else int(amount * unit)

    return Limits(memory_bytes=counted(reward.memory_gib, GIB), cpu_s=reward.cpu_s,
                  file_bytes=counted(reward.file_gib, GIB), open_files=reward.open_files, processes=reward.processes,
                  output_bytes=counted(reward.output_kib, KIB))


def _signature(*, parameters: list[tuple[str, int, bool]], is_async: bool, is_shaping: bool) -> Signature:
    """A default that may be a value of any kind stays in the child."""
    made = [inspect.Parameter(name, KINDS[kind], default=None if has_default else inspect.Parameter.empty)
            for name, kind, has_default in parameters]
    return Signature({parameter.name: parameter for parameter in made}, is_async, is_shaping)


def ask_signatures(config: PolicyGradientConfig) -> dict[str, Signature]:
    """`SandboxedRewards.signatures`, of a child that ends at once. For a process that has no event loop of its own."""
    if not unknown_here(config.reward):
        return {}

    async def ask() -> dict[str, Signature]:
        children = SandboxedRewards(config, Surroundings.here(config.reward))
        try:
            return await children.signatures()
        finally:
            children.close()

    asked: Future[dict[str, Signature]] = Future()

    def run() -> None:
        try:
            asked.set_result(asyncio.run(ask()))
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=run, name="reward signatures", daemon=True).start()  # a loop may run in this one
    return asked.result()
