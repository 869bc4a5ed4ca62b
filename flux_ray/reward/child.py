"""Users' rewards in their child process, where they run as in a script.

Takes:  the functions' references, plugins, folder and environment; then a call of one function for a group.
Gives:  `make`, the entry point of the sandbox: signatures, or one value a sample and what was logged.
Knows:  the folder and the variables are put back after each call. Values are checked here, before they travel: a
        function may give anything.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from flux_ray.cluster.functions import unpack
from flux_ray.plugins import hand_over, load_plugins
from flux_ray.reward.environment import Kept, clean, link
from flux_ray.reward.registry import Function, function_of, signature_of
from flux_ray.reward.values import RewardError, Value, own_arguments, sorted_out
from flux_ray.sandbox.child import Ask, Handler


class Call(TypedDict):
    """A call of one function for `size` samples."""

    reference: str
    size: int
    who: str  # for messages
    same: dict[str, object]  # arguments of which each sample gets a copy
    each: dict[str, Sequence[object]]
    state: Mapping[str, object]  # trainer_state's fields
    named: list[str]  # what it takes of `own_arguments`
    options: dict[str, object]


class Told(TypedDict, total=False):
    """What a call gave: values and what was logged, or what is wrong with the values."""

    values: list[Value]
    samples: dict[int, str]  # whose value is wrong ► why
    logged: dict[str, float]
    wrong: str  # of all together


class ToldSignature(TypedDict):
    parameters: list[tuple[str, int, bool]]  # name, kind, whether it has a default
    is_async: bool
    is_shaping: bool


def make(
    *, references: list[str], plugins: list[str], folder: str | None, env: dict[str, str], functions: dict[str, bytes],
    run_dir: str | None,
) -> Handler:
    """The handler of a call; for a text, of the import of that function; for None, of how all functions are called."""
    clean(env)
    if folder is not None and Path(folder).is_dir():
        link(Path(folder), but=None if run_dir is None else Path(folder, run_dir))
        sys.path.append(folder)  # as `python -m` has it
    load_plugins(plugins)
    for name, packed in functions.items():
        hand_over(unpack(packed), name=name)
    function = functools.cache(function_of)  # a child imports what it calls
    kept = Kept()

    def handle(payload: Call | str | None, ask: Ask) -> dict[str, ToldSignature] | Told | Awaitable[Told] | None:
        if payload is None:
            return {reference: _signature(function(reference), reference) for reference in references}
        if isinstance(payload, str):
            function(payload)
            return None
        call = function(payload["reference"])
        with kept:
            result = _call(call, payload)
        return _beside(result, kept) if inspect.isawaitable(result) else result

    return handle


async def _beside(result: Awaitable[Told], kept: Kept) -> Told:
    with kept:
        return await result


def _signature(call: Function, reference: str) -> ToldSignature:
    signature = signature_of(call, reference)
    parameters = [(p.name, int(p.kind), p.default is not p.empty) for p in signature.parameters.values()]
    return {"parameters": parameters, "is_async": signature.is_async, "is_shaping": signature.is_shaping}


def _call(call: Function, payload: Call) -> Told | Awaitable[Told]:
    size = payload["size"]
    logged: dict[str, float] = {}
    given: dict[str, object] = {name: [value] * size for name, value in payload["same"].items()}
    given |= payload["each"]
    named = own_arguments(payload["state"], logged)
    given |= {name: named[name] for name in payload["named"]} | payload["options"]
    result = call(**given)
    if inspect.isawaitable(result):
        return _awaited(result, payload, logged)
    return _told(result, payload, logged)


async def _awaited(result: Awaitable[object], payload: Call, logged: dict[str, float]) -> Told:
    return _told(await result, payload, logged)


def _told(result: object, payload: Call, logged: dict[str, float]) -> Told:
    try:
        values, wrong = sorted_out(result, payload["size"], payload["who"])
        return {"values": values, "samples": wrong, "logged": logged}
    except RewardError as error:
        return {"wrong": str(error)}
