"""`flux-ray view RUN...`: the page of runs, for a browser on this machine.

Takes:  folders of runs, a port, whether to open a browser.
Gives:  the page until Ctrl-C; its address on the terminal.
Never:  listens to another machine.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import webbrowser
from collections.abc import Sequence

from flux_ray.errors import UserError
from flux_ray.observability.page.runs import found_runs

HOST = "127.0.0.1"
PORT = 6080


def command(arguments: Sequence[str]) -> None:
    """Serves until it is interrupted. UserError where no folder holds a run, or a port that was named is in use."""
    parser = argparse.ArgumentParser(prog="flux-ray view", description="Shows runs on a page in the browser.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; several are laid over each other")
    parser.add_argument("--port", type=int, help=f"of {HOST} (default: {PORT}, or a free one where that is in use)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    asked = parser.parse_args(list(arguments))
    runs, wrong = found_runs(asked.runs)
    listening = _listen(asked.port)
    address = f"http://{HOST}:{listening.getsockname()[1]}/"
    for line in wrong:
        print(f"warning: {line}; the others are shown", flush=True)
    print(f"{', '.join(run.name for run in runs)}: {address}  (Ctrl-C ends it)", flush=True)
    if asked.open and not webbrowser.open(address):
        print("no browser was found: open the address in one yourself", flush=True)
    from flux_ray.observability.page.server import application

    asyncio.run(_serve(application(runs, wrong), listening))


async def _serve(app: object, listening: socket.socket) -> None:
    from aiohttp import web

    assert isinstance(app, web.Application)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _listen(port: int | None) -> socket.socket:
    try:
        return socket.create_server((HOST, PORT if port is None else port))
    except (OSError, OverflowError) as error:
        if port is not None:
            raise UserError(f"--port {port}: can't be listened on ({getattr(error, 'strerror', None) or error}); name "
                            "another one, or none for a free one") from None
        return socket.create_server((HOST, 0))
