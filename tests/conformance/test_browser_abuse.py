"""What a hostile page may try in a leased tab, one test for each attempt.

Every attempt is proved to work where nothing stops it, or to have run; takes bounded time; and leaves the
sibling contexts and the next lease unharmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

import pytest
from playwright.async_api import Error as PlaywrightError

from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Resource, Site
from palaestra.sandboxes.browser._processes import family_of, parent_of
from tests.conftest import require
from tests.sandboxes.hostview import eventually
from tests.sandboxes.pages import (
    HTML,
    NO_POLICY,
    PAGE,
    bystander,
    failure_of,
    renderers_of,
    require_chromium,
    site_of,
    unguarded,
)

_LIMITS = BrowserConfig(max_tabs=4, num_ready=0, max_pages=3, memory_mb=800, max_pss_mb=700, call_timeout_s=1.5)
_LOOP = "while (true) {}"
_HOG_MB = 1500
_HOG = f"(() => {{ const all = []; for (let i = 0; i < {_HOG_MB}; i++) all.push(new Uint8Array(1e6).fill(1));"
_HOG += " return all.length })()"
_HEAP_HOG = "(() => { const all = []; while (true) all.push(new Array(10000).fill(1.5)) })()"
_POPUPS = "(() => { let n = 0; for (let i = 0; i < 50; i++) if (open('/')) n++; return n })()"
_BLOBS = """(async () => { window.all = []; for (let i = 0; i < 60; i++) {
  const blob = new Blob([new Uint8Array(2e7).fill(1)]); all.push(blob); await blob.slice(0, 1).arrayBuffer();
  await new Promise((done) => setTimeout(done, 20)); } })(); 1"""
_NODES = """(() => { for (let i = 0; i < 50000; i++) {
  document.body.append(Object.assign(document.createElement('button'), {textContent: `press ${i}`})); }
  return document.querySelectorAll('button').length })()"""
_STAY = "addEventListener('beforeunload', (event) => { event.preventDefault(); event.returnValue = 'stay' }); 1"


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture
async def patient_pool() -> AsyncIterator[BrowserPool]:
    """The same with time for payloads that take seconds."""
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS.model_copy(update={"call_timeout_s": 30.0}))
    yield pool
    await pool.aclose()


@pytest.fixture
async def pool() -> AsyncIterator[BrowserPool]:
    """Tabs that show a page which its policy does not hold back: only the pool's own limits do."""
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS)
    yield pool
    await pool.aclose()


async def test_65_endless_loop_in_a_call_is_the_pages_doing(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        failure = await failure_of(tab, _LOOP)
        assert (failure.by, failure.ended) == ("page", "timeout")
        assert tab.is_broken


async def test_65_endless_loop_between_calls_is_closed_in_time(pool: BrowserPool) -> None:
    browser = pool.pid
    async with bystander(pool):
        async with pool.lease() as tab:
            await tab.call("eval", f"setTimeout(() => {{ {_LOOP} }}); 1")
            failure = await failure_of(tab, "1")  # nobody answers: the loop runs
            assert (failure.by, failure.ended) == ("page", "timeout")
            hung, started_s = set(renderers_of(pool)), time.monotonic()
        assert time.monotonic() - started_s < 5.0
        assert await eventually(lambda: len(hung & set(renderers_of(pool))) == 1)  # the bystander's
    assert pool.pid == browser


async def test_66_memory_beyond_the_limit_is_the_pages_doing(patient_pool: BrowserPool) -> None:
    require("bwrap", None if patient_pool.limits_memory else "no memory cgroup, and the pool says so")
    async with bystander(patient_pool), patient_pool.lease() as tab:
        failure = await failure_of(tab, _HOG)
        assert (failure.by, failure.ended) == ("page", "oom")


async def test_66_the_same_memory_is_had_below_the_limit() -> None:
    config = _LIMITS.model_copy(update={"memory_mb": 2 * _HOG_MB, "call_timeout_s": 30.0})
    pool = await BrowserPool.start(site_of(), config)
    try:
        async with pool.lease() as tab:
            assert await tab.call("eval", _HOG) == _HOG_MB
    finally:
        await pool.aclose()


async def test_66_memory_that_all_pages_share_is_the_doing_of_who_filled_it(patient_pool: BrowserPool) -> None:
    browser = patient_pool.pid
    async with bystander(patient_pool):
        for _ in range(2):
            async with patient_pool.lease() as tab:
                await tab.call("eval", _BLOBS)
                assert await eventually(lambda tab=tab: tab.failure is not None, timeout_s=10.0)  # type: ignore[misc]
                failure = await failure_of(tab, "1")
                assert (failure.by, failure.ended) == ("page", "oom")
    assert patient_pool.pid == browser


async def test_66_the_kernel_takes_pages_first(pool: BrowserPool) -> None:
    async with pool.lease():
        pages = renderers_of(pool)
        others = set(family_of(pool.pid)) - set(pages)
        assert await eventually(lambda: min(map(_badness, pages)) > max(map(_badness, others)))


def _badness(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_66_heap_beyond_the_limit_is_the_pages_doing(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        failure = await failure_of(tab, _HEAP_HOG)
        assert (failure.by, failure.ended) == ("page", "crash")


async def test_67_popups_beyond_the_limit_are_closed(patient_pool: BrowserPool) -> None:
    async with bystander(patient_pool), patient_pool.lease() as tab:
        assert await tab.call("eval", _POPUPS) == 50
        assert await eventually(lambda: len(tab.page.context.pages) == _LIMITS.max_pages)
        assert tab.is_broken


async def test_67_an_unguarded_browser_opens_them_all() -> None:
    async with unguarded() as browser:
        page = await browser.new_page()
        assert await page.evaluate(_POPUPS.replace("'/'", "'about:blank'")) == 50
        assert await eventually(lambda: len(page.context.pages) == 51)


async def test_68_many_nodes_cost_bounded_time_to_look_at() -> None:
    own = [files("palaestra.envs.browser").joinpath(name).read_text() for name in ("clock.js", "snapshot.js")]
    page = PAGE + "".join(f"<script>{text}</script>" for text in own).encode()
    pool = await BrowserPool.start(site_of(page, NO_POLICY), _LIMITS.model_copy(update={"call_timeout_s": 8.0}))
    try:
        async with bystander(pool), pool.lease() as tab:
            assert await tab.call("eval", _NODES) == 50_000
            [row] = await tab.call("palaestraTree.rows")
            assert "elements; more than 300 cannot be shown" in row[2]
        async with pool.lease() as tab:
            assert await tab.call("eval", _NODES.replace("50000", "290")) == 290
            assert ["button", "press 289"] in [row[1:3] for row in await tab.call("palaestraTree.rows")]
    finally:
        await pool.aclose()


async def test_69_dialogs_answer_themselves(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        assert await tab.call(
            "eval", "Array.from({length: 20}, () => [alert('x'), confirm('?')][1]).includes(true)"
        ) is (False)
        failure = await failure_of(tab, "while (true) alert('x')")
        assert (failure.by, failure.ended) == ("page", "timeout")


async def test_69_a_page_that_asks_to_stay_is_left() -> None:
    origin = "http://site.invalid"
    pages = {"/": Resource(PAGE, HTML), "/next": Resource(b"next", HTML)}
    pool = await BrowserPool.start(Site(origin + "/", {origin: pages.get}, NO_POLICY), _LIMITS)
    try:
        async with bystander(pool), pool.lease() as tab:
            shown: list[object] = []
            tab._session.on("Page.javascriptDialogOpening", lambda event: shown.append(event["type"]))
            await tab._session.send("Page.enable")
            await tab.call("eval", _STAY)
            await tab.run("click", lambda: tab.page.click("body"))  # a page that nobody touched may not ask
            async with asyncio.timeout(3.0):
                await tab.goto(origin + "/next")
            assert shown == ["beforeunload"]
            assert await tab.call("eval", "document.body.innerText") == "next"
    finally:
        await pool.aclose()


async def test_69_a_page_that_asks_to_stay_stays_where_nobody_answers() -> None:
    async with unguarded() as browser:
        page = await browser.new_page()
        shown: list[str] = []
        page.on("dialog", lambda dialog: shown.append(dialog.type))
        await page.set_content("hello")
        await page.evaluate(_STAY)
        await page.click("body")
        with pytest.raises(PlaywrightError, match="Timeout"):
            await page.goto("data:text/html,next", timeout=1000)
        assert shown == ["beforeunload"]


async def test_69_a_dialog_blocks_where_nobody_answers() -> None:
    async with unguarded() as browser:
        page = await browser.new_page()
        page.on("dialog", lambda _: None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await page.evaluate("alert('x')")


async def test_70_a_crash_is_the_pages_doing_at_once(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await tab._session.send("Page.crash")  # which nobody answers any more
        started_s = time.monotonic()
        failure = await failure_of(tab, "1")
        assert (failure.by, failure.ended) == ("page", "crash")
        assert time.monotonic() - started_s < 0.5


async def test_70_a_renderer_killed_from_outside_is_not_the_pages_doing(pool: BrowserPool) -> None:
    async with bystander(pool):
        others = set(renderers_of(pool))
        async with pool.lease() as tab, asyncio.TaskGroup() as group:
            [own] = set(renderers_of(pool)) - others
            failure = group.create_task(failure_of(tab, _LOOP))
            await asyncio.sleep(0.2)
            started_s = time.monotonic()
            os.kill(own, signal.SIGKILL)
            assert ((await failure).by, (await failure).ended) == ("browser", "killed")
            assert time.monotonic() - started_s < 1.0


async def test_71_killed_browser_fails_its_leases_and_the_next_lease_has_another(pool: BrowserPool) -> None:
    await _is_replaced_after_a_kill_of(pool, pool.pid)


async def test_71_killed_chromium_in_its_cage_fails_its_leases_and_the_next_lease_has_another(
    pool: BrowserPool,
) -> None:
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in family_of(pool.pid)}
    [inner] = [
        pid
        for pid, words in lines.items()
        if words[0].endswith((b"chromium", b"headless-shell"))
        and not any(word.startswith(b"--type=") for word in words)
    ]
    assert inner != pool.pid
    await _is_replaced_after_a_kill_of(pool, inner)


async def test_72_killed_driver_fails_its_leases_and_the_next_lease_has_another(pool: BrowserPool) -> None:
    await _is_replaced_after_a_kill_of(pool, parent_of(pool.pid))


async def _is_replaced_after_a_kill_of(pool: BrowserPool, victim: int) -> None:
    browser = pool.pid
    async with pool.lease() as first, pool.lease() as second, asyncio.TaskGroup() as group:
        failures = [group.create_task(failure_of(tab, _LOOP)) for tab in (first, second)]
        await asyncio.sleep(0.2)
        started_s = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        assert [((await one).by, (await one).ended) for one in failures] == [("browser", "died")] * 2
        assert time.monotonic() - started_s < 1.0
    async with asyncio.timeout(10.0), pool.lease() as tab:
        assert await tab.call("twice", 21) == 42
        assert pool.pid != browser
        assert await pool.num_contexts() == 1
    assert pool.pids == [pool.pid]
