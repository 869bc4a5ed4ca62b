"""Serves the page of some runs, to this machine alone.

Takes:  runs.
Gives:  `application`, for aiohttp: the page, its assets, and JSON under /api/.
Knows:  a page of another site may send a browser here by a name of its own: the Host must be ours.
Never:  writes; listens to another machine (view.py binds it to 127.0.0.1); sends what rollouts say as HTML.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
from collections.abc import Awaitable, Callable
from importlib.resources import files

from aiohttp import web

from flux_ray.errors import UserError, unknown
from flux_ray.observability.page.runs import Record, Run, differences
from flux_ray.observability.page.table import SORTABLE, Table, Wanted, table_of
from flux_ray.observability.page.timeline import timeline
from flux_ray.observability.page.tokens import Texts
from flux_ray.observability.run_folder import EVAL, METRICS

HOSTS = ("127.0.0.1", "localhost")
ASSETS = files(__package__) / "assets"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MOST_ROWS = 200  # of a page of the table
MOST_TOKENS = 2_000  # of a sample, unless more are asked for

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Looks:
    """What the page asks for, of runs by their number."""

    def __init__(self, runs: list[Run], wrong: list[str]) -> None:
        self._runs = runs
        self._wrong = wrong
        self._tables: dict[int, Table] = {}
        self._texts: dict[int, Texts] = {}

    def runs(self) -> Record:
        return {"notes": self._wrong, "runs": [
            {"id": number, "name": run.name, "path": str(run.path), "state": run.state, "notes": run.notes(),
             "traces": run.trace_steps()} for number, run in enumerate(self._runs)]}

    def metrics(self, asked: dict[str, str]) -> Record:
        """The lines since `cursor`: by metric, a value for each of `steps`."""
        lines = self._run(asked).lines(METRICS, asked.get("cursor", ""))
        names = sorted({name for record in lines.records for name in record} - {"step"})
        values = {name: [_number(record.get(name)) for record in lines.records] for name in names}
        return {"cursor": lines.cursor, "anew": lines.anew, "values": values,
                "steps": [_number(record.get("step")) for record in lines.records]}

    def evaluations(self, asked: dict[str, str]) -> Record:
        return {"evaluations": self._run(asked).lines(EVAL).records}

    def rollouts(self, asked: dict[str, str]) -> Record:
        size = min(_int(asked, "size", 50), MOST_ROWS)
        return self._table(asked).page(_wanted(asked), first=max(0, _int(asked, "first", 0)), size=max(1, size))

    def group(self, asked: dict[str, str]) -> Record:
        """Its samples, with texts of their tokens, of which each has at most `tokens` (0: all)."""
        step, uid, attempt = (_int(asked, name, 0) for name in ("step", "uid", "attempt"))
        rows = self._table(asked).group(step, uid, attempt)
        if not rows:
            raise UserError(f"step {step} has no group of prompt {uid}, attempt {attempt}")
        number = _int(asked, "run", 0)
        if number not in self._texts:
            self._texts[number] = Texts(self._run(asked))
        texts, most = self._texts[number], _int(asked, "tokens", MOST_TOKENS)
        for row in rows:
            ids = row.get("token_ids") or []
            row["length"] = len(ids)
            if most and len(ids) > most:
                row |= {name: value[:most] for name, value in row.items()
                        if isinstance(value, list) and len(value) == len(ids)}
            row["texts"] = texts.of(row.get("token_ids") or [])
        return {"samples": rows, "note": texts.note}

    def timeline(self, asked: dict[str, str]) -> Record:
        return timeline(self._run(asked), _int(asked, "step", 0))

    def config(self) -> Record:
        of_runs = [run.options() for run in self._runs]
        return {"options": sorted({key for options in of_runs for key in options}), "values": of_runs,
                "differ": differences(of_runs)}

    def _run(self, asked: dict[str, str]) -> Run:
        number = _int(asked, "run", 0)
        if not 0 <= number < len(self._runs):
            raise UserError(f"run={number}: there are runs 0 to {len(self._runs) - 1}")
        return self._runs[number]

    def _table(self, asked: dict[str, str]) -> Table:
        number, run = _int(asked, "run", 0), self._run(asked)
        if number not in self._tables:
            self._tables[number] = table_of(run)
        return self._tables[number]


def _wanted(asked: dict[str, str]) -> Wanted:
    """By the names of Wanted's fields. UserError for a value of another kind, or an unknown column."""
    sort = asked.get("sort", "step")
    if sort not in SORTABLE:
        raise unknown("column", sort, SORTABLE)
    values: Record = {}
    for field in dataclasses.fields(Wanted):
        text = asked.get(field.name, "")
        if text:
            values[field.name] = _READ[str(field.type)](field.name, text)
    return Wanted(**values)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text}: must be a whole number") from None


def _real(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name}={text}: must be a number") from None


_READ: dict[str, Callable[[str, str], object]] = {
    "str": lambda name, text: text, "str | None": lambda name, text: text, "int | None": _whole,
    "float | None": _real, "bool": lambda name, text: text == "true", "bool | None": lambda name, text: text == "true",
}


def _int(asked: dict[str, str], name: str, default: int) -> int:
    return _whole(name, asked[name]) if asked.get(name) else default


def _number(value: object) -> object:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _plain(value: object) -> object:
    """As JSON has it: nan and inf become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def application(runs: list[Run], wrong: list[str]) -> web.Application:
    """`wrong`: lines about folders that hold no run, which the page shows."""
    looks = Looks(runs, wrong)
    answers: dict[str, Callable[[dict[str, str]], Record]] = {
        "runs": lambda asked: looks.runs(), "metrics": looks.metrics, "evaluations": looks.evaluations,
        "rollouts": looks.rollouts, "group": looks.group, "timeline": looks.timeline,
        "config": lambda asked: looks.config()}
    app = web.Application(middlewares=[_guarded])
    for name, answer in answers.items():
        app.router.add_get(f"/api/{name}", functools.partial(_answer, answer))
    app.router.add_get("/", _asset)
    app.router.add_get("/{name}", _asset)
    return app


async def _answer(answer: Callable[[dict[str, str]], Record], request: web.Request) -> web.Response:
    """What it gives, worked out beside the loop; a mistake in what was asked is a line with status 400."""
    try:
        status, value = 200, await asyncio.to_thread(answer, dict(request.query))
    except UserError as error:
        status, value = 400, {"error": str(error)}
    body = await asyncio.to_thread(lambda: json.dumps(_plain(value), default=str))
    return web.Response(text=body, status=status, content_type="application/json")


async def _asset(request: web.Request) -> web.Response:
    name = request.match_info.get("name", "index.html")
    kind = TYPES.get(name.rpartition(".")[2])
    file = ASSETS / name
    if kind is None or "/" in name or "\\" in name or not file.is_file():
        raise web.HTTPNotFound(text=f"there is no {name}")
    return web.Response(body=file.read_bytes(), content_type=kind, charset="utf-8")


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    name, _, port = request.host.rpartition(":")
    name = name or port
    if name not in HOSTS:
        response: web.StreamResponse = web.Response(status=403, text="this page is 127.0.0.1's alone")
    else:
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = web.Response(status=error.status, text=error.text)
    response.headers.update(HEADERS)
    return response
