"""Whose fault it was: decided by the state of page and browser, whatever a page, a site or a call says or does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Error as PlaywrightError

from palaestra.errors import SandboxError, TaskError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Resource, Site, TabError
from palaestra.sandboxes.browser._chromium import Chromium
from palaestra.sandboxes.browser._processes import parent_of
from tests.sandboxes.hostview import eventually
from tests.sandboxes.pages import HTML, NO_POLICY, PAGE, require_chromium, site_of

_LIMITS = BrowserConfig(max_tabs=3, num_ready=0, call_timeout_s=2.0, load_timeout_s=2.0)
_ORIGIN = "http://site.invalid"


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture
async def pool() -> AsyncIterator[BrowserPool]:
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS)
    yield pool
    await pool.aclose()


@pytest.mark.parametrize("word", ["closed", "crashed", "terminated", "Target page has been closed"])
async def test_no_word_of_a_pages_message_decides_whose_fault_it_was(pool: BrowserPool, word: str) -> None:
    async with pool.lease() as tab:
        started_s = time.monotonic()
        with pytest.raises(PlaywrightError, match=word):
            await tab.run("evaluate", lambda: tab.page.evaluate(f"() => {{ throw new Error('{word}') }}"))
        assert time.monotonic() - started_s < 0.5
        assert not tab.is_broken
        with pytest.raises(TaskError, match=word):
            await tab.call("eval", f"throw new Error('{word}')")


async def test_a_page_that_closed_under_a_call_is_the_pages_doing(pool: BrowserPool) -> None:
    async with pool.lease() as tab, asyncio.TaskGroup() as group:
        wait = group.create_task(_failing(tab.run("wait", lambda: tab.page.wait_for_selector("none"))))
        await asyncio.sleep(0.1)
        await tab.page.close()
        failure = await wait
        assert (failure.by, failure.ended) == ("page", "closed")


async def _failing(call: object) -> TabError:
    with pytest.raises(TabError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_everybody_hears_of_a_death_whatever_one_of_them_does(pool: BrowserPool) -> None:
    heard: list[TabError] = []

    def refuse(failure: TabError) -> None:
        heard.append(failure)
        raise RuntimeError("a fault of ours")

    async with pool.lease() as tab:
        browser = tab.chromium
        assert isinstance(browser, Chromium)
        for number in range(2):
            browser.watch(f"page {number}", refuse)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            browser.die("for a test")
        assert len(heard) == 2
        assert tab.failure is browser.failure is not None
    assert await eventually(lambda: pool.pids == [])  # it was buried, too


async def test_a_start_page_that_hangs_ends_alone() -> None:
    loops = False

    def serve(_: str) -> Resource:
        return Resource(b"<script>while (true) {}</script>" if loops else PAGE, HTML)

    pool = await BrowserPool.start(Site(f"{_ORIGIN}/", {_ORIGIN: serve}), _LIMITS)
    try:
        async with pool.lease() as sibling:
            loops = True
            browser = pool.pid
            for _ in range(2):
                with pytest.raises(SandboxError, match=r"did not load http://site\.invalid/: .*Timeout 2000ms"):
                    await pool.acquire()
            assert pool.pid == browser
            assert await sibling.call("twice", 2) == 4
            assert sibling.chromium._pages.keys() == {sibling._target_id}  # the others are watched no more
            assert await pool.num_contexts() == 1
    finally:
        await pool.aclose()


async def test_a_start_page_that_hangs_once_it_has_loaded_ends_alone() -> None:
    later = False

    def serve(_: str) -> Resource:
        return Resource(b"<script>onload = () => { while (true) {} }</script>" if later else PAGE, HTML)

    pool = await BrowserPool.start(Site(f"{_ORIGIN}/", {_ORIGIN: serve}), _LIMITS)
    try:
        async with pool.lease() as sibling:
            later = True
            with pytest.raises(SandboxError, match="did not load"):
                await pool.acquire()
            assert await sibling.call("twice", 2) == 4
            assert await pool.num_contexts() == 1
    finally:
        await pool.aclose()


async def test_a_site_that_raises_is_named_and_harms_nobody_else() -> None:
    is_broken = False

    def serve(path: str) -> Resource | None:
        if is_broken or path == "/odd":
            raise KeyError("no such file")
        return Resource(PAGE, HTML)

    pool = await BrowserPool.start(Site(f"{_ORIGIN}/", {_ORIGIN: serve}, NO_POLICY), _LIMITS)
    try:
        async with pool.lease() as sibling:
            is_broken = True
            with pytest.raises(
                TaskError, match=r"function for http://site.invalid raised KeyError\('no such file'\) on /"
            ):
                await pool.acquire()
            is_broken = False
            await sibling.call("eval", "fetch('/odd').then(() => window.told = 1, () => window.told = 2); 1")
            await sibling.run("wait", lambda: sibling.page.wait_for_function("window.told"))
            assert await sibling.call("eval", "told") == 2  # that request failed, and no more
            with pytest.raises(TaskError, match="on /odd"):
                await sibling.goto(f"{_ORIGIN}/odd")
            await sibling.goto(f"{_ORIGIN}/")
            assert await sibling.call("twice", 2) == 4
    finally:
        await pool.aclose()


async def test_addresses_without_an_answer_and_those_that_hang_are_the_pages_doing() -> None:
    pages = {"/": Resource(PAGE, HTML), "/loop": Resource(b"<script>while (true) {}</script>", HTML)}
    pool = await BrowserPool.start(Site(f"{_ORIGIN}/", {_ORIGIN: pages.get}, NO_POLICY), _LIMITS)
    try:
        async with pool.lease() as tab:
            with pytest.raises(TabError, match=r"nothing to show at http://site\.invalid/missing") as missing:
                await tab.goto(f"{_ORIGIN}/missing")
            assert (missing.value.by, missing.value.ended) == ("page", "address")
            await tab.goto(f"{_ORIGIN}/")
            assert await tab.call("twice", 2) == 4
            with pytest.raises(TabError, match="loop did not load within 2 s") as late:
                await tab.goto(f"{_ORIGIN}/loop")
            assert (late.value.by, late.value.ended, tab.is_broken) == ("page", "timeout", True)
    finally:
        await pool.aclose()


_FLOODS = {
    "console": "console.log(text + Math.random())",
    "a frame's console": "frame.contentWindow.console.error(text + Math.random())",
    "errors": "setTimeout(() => { throw new Error(text + Math.random()) })",
    "rejections": "Promise.reject(new Error(text + Math.random()))",
}


@pytest.mark.parametrize("flood", list(_FLOODS))
async def test_what_a_page_tells_the_console_does_not_reach_the_driver(pool: BrowserPool, flood: str) -> None:
    start = (
        "const text = 'x'.repeat(400000), frame = document.body.appendChild(document.createElement('iframe'));"
        # no more than that: what the page itself keeps of it would fill its memory on a fast machine
        "window.num = 0; setInterval(() => {"
        f" for (let i = 0; i < 20 && num < 1500; i++) {{ {_FLOODS[flood]}; num++ }} }}, 1); 1"
    )
    driver = parent_of(pool.pid)
    async with pool.lease() as sibling, pool.lease() as tab:
        before_mb = _resident_mb(driver)
        await tab.call("eval", start)
        await asyncio.sleep(2.0)
        assert _resident_mb(driver) - before_mb < 20
        assert await sibling.call("twice", 2) == 4
        assert await tab.call("eval", "num") > 200


def _resident_mb(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
