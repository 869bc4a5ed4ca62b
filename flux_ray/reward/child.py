"""Users' rewards in their child process, where they run as in a script.

Takes:  the functions' references, plugins, folder and environment; then a call of one function for a group.
Gives:  `make`, the entry point of the sandbox: signatures, or one value a sample and what was logged.
Knows:  values are checked here, for whatever a function gives can't travel.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from flux_ray.cluster.functions import unpack
from flux_ray.plugins import hand_over, load_plugins
from flux_ray.reward.registry import Function, function_of, signature_of
from flux_ray.reward.values import RewardError, checked, own_arguments
from flux_ray.sandbox.child import Ask, Handler

Told = dict[str, Any]


def make(
    *, references: list[str], plugins: list[str], folder: str | None, env: dict[str, str], functions: dict[str, bytes]
) -> Handler:
    """The handler of a call, or, for None, of how all functions are called."""
    os.environ.update(env)
    if folder is not None and Path(folder).is_dir():
        os.chdir(folder)
        sys.path.append(folder)  # as `python -m` has it
    load_plugins(plugins)
    for name, packed in functions.items():
        hand_over(unpack(packed), name=name)
    function = functools.cache(function_of)  # a child imports what it calls

    def handle(payload: dict[str, Any] | None, ask: Ask) -> Told | Coroutine[Any, Any, Told]:
        if payload is None:
            return {reference: _signature(function(reference), reference) for reference in references}
        return _call(function(payload["reference"]), payload)

    return handle


def _signature(call: Function, reference: str) -> Told:
    signature = signature_of(call, reference)
    parameters = [[p.name, int(p.kind), p.default is not p.empty] for p in signature.parameters.values()]
    return {"parameters": parameters, "is_async": signature.is_async, "is_shaping": signature.is_shaping}


def _call(call: Function, payload: dict[str, Any]) -> Told | Coroutine[Any, Any, Told]:
    size: int = payload["size"]
    logged: dict[str, float] = {}
    given = {name: [value] * size for name, value in payload["same"].items()} | payload["each"]
    named = own_arguments(payload["state"], logged)
    given |= {name: named[name] for name in payload["named"]} | payload["options"]
    result = call(**given)
    if inspect.isawaitable(result):
        return _awaited(result, payload, logged)
    return _told(result, payload, logged)


async def _awaited(result: Any, payload: dict[str, Any], logged: dict[str, float]) -> Told:
    return _told(await result, payload, logged)


def _told(result: Any, payload: dict[str, Any], logged: dict[str, float]) -> Told:
    try:
        return {"values": checked(result, payload["size"], payload["who"]), "logged": logged}
    except RewardError as error:
        return {"wrong": str(error)}
