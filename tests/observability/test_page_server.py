"""The page as it is served, and as a browser shows it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from flux_ray.observability.page.runs import found_runs
from flux_ray.observability.page.server import ASSETS, application
from tests.fakes.browser import CHROMIUM, Page, browser
from tests.fakes.run_files import write_lines, write_metrics, write_rollouts, write_run

EVIL = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@contextlib.asynccontextmanager
async def served(*folders: Path) -> AsyncIterator[TestClient]:
    async with TestClient(TestServer(application(*found_runs(folders)))) as client:
        yield client


@pytest.mark.unit
async def test_every_answer_forbids_what_the_page_does_not_need(tmp_path):
    async with served(write_run(tmp_path / "one")) as client:
        for path in ("/", "/page.js", "/api/runs", "/none", "/api/group?step=77"):
            answer = await client.get(path)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.unit
@pytest.mark.parametrize("host, status", [
    ("127.0.0.1:6080", 200), ("localhost", 200), ("evil.example", 403), ("127.0.0.1.evil.example:80", 403)])
async def test_only_this_machine_s_names_are_answered(tmp_path, host, status):
    async with served(write_run(tmp_path / "one")) as client:
        assert (await client.get("/api/runs", headers={"Host": host})).status == status


@pytest.mark.unit
@pytest.mark.parametrize("path", [
    "/../server.py", "/..%2fserver.py", "/%2e%2e/server.py", "/server.py", "/__init__.py"])
async def test_nothing_but_the_assets_is_served(tmp_path, path):
    async with served(write_run(tmp_path / "one")) as client:
        assert (await client.get(path)).status == 404
        assert (await client.post("/api/runs")).status == 405


@pytest.mark.unit
@pytest.mark.parametrize("asked, line", [
    ("rollouts?sort=rewrd", "unknown column 'rewrd': did you mean 'reward'?"),
    ("rollouts?uid=x", "uid=x: must be a whole number"),
    ("rollouts?least_reward=x", "least_reward=x: must be a number"),
    ("metrics?run=4", "run=4: there are runs 0 to 0"), ("timeline?step=1", "step 1 has no time line"),
    ("group?step=1&uid=99", "step 1 has no group of prompt 99, attempt 0")])
async def test_a_wrong_question_is_answered_by_a_line(tmp_path, asked, line):
    async with served(write_run(tmp_path / "one")) as client:
        answer = await client.get(f"/api/{asked}")
        assert answer.status == 400 and (await answer.json())["error"].startswith(line)


@pytest.mark.unit
async def test_metrics_come_by_name_and_only_what_is_new(tmp_path):
    run = write_run(tmp_path / "one")
    async with served(run) as client:
        first = await (await client.get("/api/metrics")).json()
        write_lines(run / "metrics.jsonl", [{"step": 4, "reward/mean": float("nan"), "new": 1.0}])
        second = await (await client.get("/api/metrics", params={"cursor": first["cursor"]})).json()
    assert first["steps"] == [0, 1, 2, 3] and first["values"]["actor/grpo_kl"][0] is None
    assert (second["steps"], second["values"], second["anew"]) == ([4], {"new": [1.0], "reward/mean": [None]}, False)


@pytest.mark.unit
async def test_long_samples_are_cut_unless_all_is_asked_for(tmp_path):
    write_rollouts(tmp_path, 0, groups=1, group_size=2, num_tokens=3_000)
    async with served(tmp_path) as client:
        cut = (await (await client.get("/api/group?step=0&uid=0")).json())["samples"][0]
        whole = (await (await client.get("/api/group?step=0&uid=0&tokens=0")).json())["samples"][0]
    assert (cut["length"], len(cut["token_ids"]), len(cut["texts"]), len(cut["advantages"])) == (3004, *[2000] * 3)
    assert len(whole["texts"]) == 3004


@pytest.mark.unit
def test_no_script_of_ours_makes_markup_of_a_text():
    ours = [file for file in ASSETS.iterdir() if file.name.endswith(".js") and not file.name.startswith("uPlot")]
    assert len(ours) > 6
    words = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "http")
    found = [(file.name, word) for file in ours for word in words
             if word in file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")]
    assert found == []


# ---- in a browser

pytest_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium isn't installed: apt-get install chromium")


@contextlib.asynccontextmanager
async def looked_at(*folders: Path) -> AsyncIterator[tuple[Page, str]]:
    """A browser, and the address of the page."""
    runner = web.AppRunner(application(*found_runs(folders)), shutdown_timeout=1)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await web.SockSite(runner, listening).start()
        try:
            async with browser() as page:
                await page.look(width=1300)
                yield page, f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            await runner.cleanup()


@pytest.mark.system
@pytest_browser
async def test_every_view_shows_what_it_should_without_an_error(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    (two / "config.yaml").write_text("algo: {name: dapo}\n", encoding="utf-8")
    write_lines(one / "eval.jsonl", [{"step": 5, "eval/mean": 1.0, "answers": [
        {"prompt": "1+1=", "completion": EVIL, "reward": 1.0}]}])
    looks = {
        "#curves": "document.querySelectorAll('canvas').length >= 4",
        "#curves?filter=entropy": "document.querySelectorAll('canvas').length == 1",
        "#evaluations": f"document.body.innerText.includes({EVIL!r})",
        "#rollouts?sort=reward&search=7%2B7": "document.querySelectorAll('tbody tr').length == 4",
        "#group?step=2&uid=4&attempt=0": "document.querySelectorAll('.sample').length == 4 && "
                                         "document.querySelectorAll('.tokens .token').length == 48",
        "#timeline": "document.querySelectorAll('rect').length == 6",
        "#config": "document.body.innerText.includes('dapo') && document.querySelectorAll('tbody tr').length == 3",
    }
    async with looked_at(one, two) as (page, address):
        for dark, width in ((False, 1300), (True, 420)):
            await page.look(width=width, dark=dark)
            for where, shown in looks.items():
                await page.goto("about:blank")
                await page.goto(address + where)
                await page.until(shown)
                assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (where, width)
                assert await page.evaluate("document.title") != "taken"
        assert page.errors == []


@pytest.mark.system
@pytest_browser
async def test_what_a_run_writes_meanwhile_is_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    async with looked_at(tmp_path) as (page, address):
        await page.goto(address)
        await page.until("document.body.innerText.includes('no metrics yet')")
        write_metrics(tmp_path, 3)
        await page.until("document.querySelector('[aria-label^=\"reward/mean by step\"]')?.ariaLabel.endsWith(' 0.9')")
        write_metrics(tmp_path, 5, first=3, gain=0.5)
        await page.until("document.querySelector('[aria-label^=\"reward/mean by step\"]')?.ariaLabel.endsWith(' 0.5')")
        assert page.errors == []


@pytest.mark.system
@pytest_browser
async def test_keys_lead_to_a_group_and_back(tmp_path):
    async with looked_at(write_run(tmp_path / "one")) as (page, address):
        await page.goto(address)
        await page.until("document.querySelectorAll('canvas').length > 0")
        await page.key("3")
        await page.until("document.querySelectorAll('tbody tr').length == 32")
        await page.key("/")
        await page.key("7")   # into the search
        await page.until("document.querySelectorAll('tbody tr').length == 4")
        await page.key("Escape")
        await page.key("j")
        await page.until("document.querySelectorAll('tbody tr')[1].className == 'chosen'")
        await page.key("Enter")
        await page.until("document.querySelectorAll('.sample').length == 4")
        assert await page.evaluate("[...document.querySelectorAll('button')].find((b) => b.textContent == 'version')"
                                   ".click() ?? document.querySelectorAll('.tokens .token.version').length") == 48
        await page.key("Escape")
        await page.until("document.querySelectorAll('tbody tr').length == 4")
        await page.key("?")
        await page.until("!document.getElementById('keys').hidden")
        await page.key("t")
        await page.until("document.documentElement.dataset.theme == 'dark'")
        assert page.errors == []


@pytest.mark.system
@pytest_browser
async def test_a_page_whose_server_has_ended_says_so(tmp_path):
    async with looked_at(write_run(tmp_path / "one")) as (page, address):
        await page.goto(address)
        await page.until("document.querySelectorAll('canvas').length > 0")
        await page.evaluate("window.fetch = () => Promise.reject(new Error('gone'))")
        await page.until("document.getElementById('notes').innerText.includes(\"the server doesn't answer\")")
