"""A real Chromium, driven by its DevTools protocol.

Takes:  an address.
Gives:  `browser()`: a page with `goto`, `evaluate`, `until`, `key`, `look`, `screenshot`; `errors` are its console's.
Knows:  `CHROMIUM` is None where there is none on this machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")
DEADLINE_S = 60
CODES = {"Enter": "\r"}


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future] = {}

    async def listen(self) -> None:
        async for message in self._socket:
            got = json.loads(message.data)
            if "id" in got:
                self._waiting.pop(got["id"]).set_result(got)
                continue
            said = got.get("params", {})
            if got["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["exceptionDetails"])[:500])
            elif got["method"] == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                self.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
            elif got["method"] == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
                self.errors.append(json.dumps(said["args"])[:500])

    async def call(self, method: str, **given: object) -> dict:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": given})
        got = await asyncio.wait_for(self._waiting[number], DEADLINE_S)
        assert "error" not in got, got
        return got["result"]

    async def goto(self, address: str) -> None:
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState == 'complete'")

    async def evaluate(self, script: str) -> object:
        got = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    async def until(self, script: str) -> object:
        """The first value of the script that is true."""
        return await _until(lambda: self.evaluate(script))

    async def key(self, key: str) -> None:
        text = CODES.get(key, key if len(key) == 1 else "")
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                        mobile=False)
        await self.call("Emulation.setEmulatedMedia",
                        features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    async def screenshot(self) -> bytes:
        """As PNG."""
        got = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(got["data"])


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """A page of a new browser, which ends with the block."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
        try:
            port = await _port(Path(profile, "DevToolsActivePort"))
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    target = next(one for one in await answer.json() if one["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    listening = asyncio.create_task(page.listen())
                    for domain in ("Page", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    yield page
                    listening.cancel()
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), DEADLINE_S)


async def _port(file: Path) -> int:
    async def read() -> str:
        with contextlib.suppress(OSError):
            return await asyncio.to_thread(file.read_text)
        return ""

    return int(str(await _until(read)).splitlines()[0])


async def _until(look: Callable[[], Awaitable[object]]) -> object:
    """The first thing that it sees."""
    async with asyncio.timeout(DEADLINE_S):
        value = await look()
        while not value:
            await asyncio.sleep(0.05)  # another process changes it
            value = await look()
        return value
