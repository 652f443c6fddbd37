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

import pytest
from playwright.async_api import Browser, Page, Route, async_playwright
from playwright.async_api import Error as PlaywrightError

from palaestra.errors import TaskError
from palaestra.sandboxes.browser import (
    STRICT_POLICY,
    BrowserConfig,
    BrowserPool,
    Resource,
    Site,
    Tab,
    TabError,
    find_chromium,
)
from palaestra.sandboxes.browser._launch import Isolation
from palaestra.sandboxes.browser._processes import parent_of
from tests.sandboxes.hostview import eventually
from tests.sandboxes.pages import HTML, NO_POLICY, PAGE, Listener, bystander, renderers_of, require_chromium, site_of

_LIMITS = BrowserConfig(max_tabs=4, num_ready=0, max_pages=3, memory_mb=800, max_pss_mb=700, call_timeout_s=1.5)
_LOOP = "while (true) {}"
_HOG_MB = 1500
_HOG = f"(() => {{ const all = []; for (let i = 0; i < {_HOG_MB}; i++) all.push(new Uint8Array(1e6).fill(1));"
_HOG += " return all.length })()"
_HEAP_HOG = "(() => { const all = []; while (true) all.push(new Array(10000).fill(1.5)) })()"
_POPUPS = "(() => { let n = 0; for (let i = 0; i < 50; i++) if (open('/')) n++; return n })()"
_NODES = "(() => { for (let i = 0; i < 50000; i++) document.body.append(document.createElement('p'));"
_NODES += " return document.querySelectorAll('p').length })()"

# Each way once: sub-resources, script, sockets, workers, forms, navigation, popups, WebRTC.
_EXFILTRATION = """<!DOCTYPE html><body><img src="{url}/img"><script src="{url}/js"></script>
<link rel="stylesheet" href="{url}/css"><iframe src="{url}/frame"></iframe><form id="f" action="{url}/form"></form>
<script>
const tries = [
  () => fetch('{url}/fetch'), () => navigator.sendBeacon('{url}/beacon'), () => new WebSocket('{socket}/ws'),
  () => new EventSource('{url}/events'), () => new Image().src = '{url}/image', () => window.open('{url}/popup'),
  () => new Worker(URL.createObjectURL(new Blob(["new WebSocket('{socket}/worker'); fetch('{url}/worker')"]))),
  () => {{ const p = new RTCPeerConnection({{iceServers: [{{urls: 'stun:127.0.0.1:{port}'}}]}});
    p.createDataChannel('x'); p.createOffer().then((o) => p.setLocalDescription(o)); }},
  () => new Image().src = 'http://hop.invalid/hop',
];
const leave = [() => document.getElementById('f').submit(), () => {{ location = '{url}/navigation' }}];
function run(tries) {{ for (const attempt of tries) {{ try {{ attempt() }} catch (error) {{}} }} return tries.length; }}
function stay() {{ return run(tries) }}
function submit() {{ return run(leave.slice(0, 1)) }}
function navigate() {{ return run(leave.slice(1)) }}
</script></body>"""

# By what sets it off; the last two leave the page.
_STAY = "img js css frame fetch beacon ws events image popup worker udp redirected"
_EXPECTED = {"stay": set(_STAY.split()), "submit": {"form"}, "navigate": {"navigation"}}


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture
async def patient_pool() -> AsyncIterator[BrowserPool]:
    """The same with time for payloads that take seconds."""
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS.model_copy(update={"call_timeout_s": 10.0}))
    yield pool
    await pool.aclose()


@pytest.fixture
async def pool() -> AsyncIterator[BrowserPool]:
    """Tabs that show a page which its policy does not hold back: only the pool's own limits do."""
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS)
    yield pool
    await pool.aclose()


@contextlib.asynccontextmanager
async def _unguarded() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        await browser.close()


async def _failure(tab: Tab, code: str) -> TabError:
    with pytest.raises(TabError) as caught:
        await tab.call("eval", code)
    return caught.value


async def _redirect(page: Page, listener: Listener) -> None:
    async def answer(route: Route) -> None:
        await route.fulfill(status=302, headers={"Location": f"http://127.0.0.1:{listener.port}/redirected"})

    await page.route("http://hop.invalid/hop", answer)


def _attack(listener: Listener) -> bytes:
    host = f"127.0.0.1:{listener.port}"
    return _EXFILTRATION.format(url=f"http://{host}", socket=f"ws://{host}", port=listener.port).encode()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [STRICT_POLICY, NO_POLICY], ids=["strict", "no-policy"])
@pytest.mark.parametrize("isolation", ["bwrap", "flags"])
async def test_63_page_reaches_no_server_of_the_host(isolation: Isolation, policy: str) -> None:
    async with Listener() as listener:
        pool = await BrowserPool.start(site_of(_attack(listener), policy), BrowserConfig(isolation=isolation))
        try:
            for attempt, count in (("stay", 9), ("submit", 1), ("navigate", 1)):
                async with pool.lease() as tab:
                    await _redirect(tab.page, listener)
                    assert await tab.call(attempt) == count
                    await asyncio.sleep(1.0)
        finally:
            await pool.aclose()
        assert listener.hits == []


@pytest.mark.slow
async def test_63_every_way_works_in_an_unguarded_browser() -> None:
    async with Listener() as listener, _unguarded() as browser:
        for attempt, expected in _EXPECTED.items():
            page = await browser.new_page()
            await _redirect(page, listener)
            await page.set_content(_attack(listener).decode())
            await page.evaluate(f"{attempt}()")
            assert await listener.hears(expected), expected - listener.ways
            await page.close()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "view-source:file:///etc/passwd", "chrome://version"])
async def test_64_files_and_internal_pages_are_out_of_reach(pool: BrowserPool, url: str) -> None:
    async with bystander(pool), pool.lease() as tab:
        with pytest.raises(ValueError, match="of no origin"):
            await tab.goto(url)
        await tab.call("eval", f"open({url!r}); location = {url!r}; 1")
        await asyncio.sleep(0.3)
        assert [page.url for page in tab.page.context.pages if page.url.startswith(("file:", "chrome:", "view"))] == []


async def test_64_a_navigation_past_the_check_finds_no_file(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        with pytest.raises(PlaywrightError, match="ERR_"):
            await tab.page.goto("file:///etc/passwd", timeout=3000)
        assert "root:" not in await tab.call("eval", "document.documentElement.outerHTML")


async def test_64_an_unguarded_browser_reads_the_file() -> None:
    async with _unguarded() as browser:
        page = await browser.new_page()
        await page.goto("file:///etc/passwd")
        assert "root:" in await page.content()


async def test_65_endless_loop_in_a_call_is_the_pages_doing(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        failure = await _failure(tab, _LOOP)
        assert (failure.by, failure.ended) == ("page", "timeout")
        assert tab.is_broken


async def test_65_endless_loop_between_calls_is_closed_in_time(pool: BrowserPool) -> None:
    browser = pool.pid
    async with bystander(pool):
        async with pool.lease() as tab:
            await tab.call("eval", f"setTimeout(() => {{ {_LOOP} }}); 1")
            failure = await _failure(tab, "1")  # nobody answers: the loop runs
            assert (failure.by, failure.ended) == ("page", "timeout")
            hung, started_s = set(renderers_of(pool)), time.monotonic()
        assert time.monotonic() - started_s < 5.0
        assert await eventually(lambda: len(hung & set(renderers_of(pool))) == 1)  # the bystander's
    assert pool.pid == browser


async def test_66_memory_beyond_the_limit_is_the_pages_doing(patient_pool: BrowserPool) -> None:
    if not patient_pool.limits_memory:
        pytest.skip("no memory cgroup on this machine, and the pool says so")
    async with bystander(patient_pool), patient_pool.lease() as tab:
        failure = await _failure(tab, _HOG)
        assert (failure.by, failure.ended) == ("page", "oom")


async def test_66_the_same_memory_is_had_below_the_limit() -> None:
    config = _LIMITS.model_copy(update={"memory_mb": 2 * _HOG_MB, "call_timeout_s": 10.0})
    pool = await BrowserPool.start(site_of(), config)
    try:
        async with pool.lease() as tab:
            assert await tab.call("eval", _HOG) == _HOG_MB
    finally:
        await pool.aclose()


async def test_66_heap_beyond_the_limit_is_the_pages_doing(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        failure = await _failure(tab, _HEAP_HOG)
        assert (failure.by, failure.ended) == ("page", "crash")


async def test_67_popups_beyond_the_limit_are_closed(patient_pool: BrowserPool) -> None:
    async with bystander(patient_pool), patient_pool.lease() as tab:
        assert await tab.call("eval", _POPUPS) == 50
        assert await eventually(lambda: len(tab.page.context.pages) == _LIMITS.max_pages)
        assert tab.is_broken


async def test_67_an_unguarded_browser_opens_them_all() -> None:
    async with _unguarded() as browser:
        page = await browser.new_page()
        assert await page.evaluate(_POPUPS.replace("'/'", "'about:blank'")) == 50
        assert await eventually(lambda: len(page.context.pages) == 51)


async def test_68_many_nodes_cost_bounded_time(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        assert await tab.call("eval", _NODES) == 50_000


async def test_69_dialogs_answer_themselves(pool: BrowserPool) -> None:
    async with bystander(pool), pool.lease() as tab:
        await tab.call("eval", "addEventListener('beforeunload', (event) => { event.preventDefault(); return 'stay' })")
        assert await tab.call(
            "eval", "Array.from({length: 20}, () => [alert('x'), confirm('?')][1]).includes(true)"
        ) is (False)
        failure = await _failure(tab, "while (true) alert('x')")
        assert (failure.by, failure.ended) == ("page", "timeout")


async def test_69_a_dialog_blocks_where_nobody_answers() -> None:
    async with _unguarded() as browser:
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
        failure = await _failure(tab, "1")
        assert (failure.by, failure.ended) == ("page", "crash")
        assert time.monotonic() - started_s < 0.5


async def test_70_a_renderer_killed_from_outside_is_not_the_pages_doing(pool: BrowserPool) -> None:
    async with bystander(pool):
        others = set(renderers_of(pool))
        async with pool.lease() as tab, asyncio.TaskGroup() as group:
            [own] = set(renderers_of(pool)) - others
            failure = group.create_task(_failure(tab, _LOOP))
            await asyncio.sleep(0.2)
            started_s = time.monotonic()
            os.kill(own, signal.SIGKILL)
            assert ((await failure).by, (await failure).ended) == ("browser", "killed")
            assert time.monotonic() - started_s < 1.0


async def test_71_killed_browser_fails_its_leases_and_the_next_lease_has_another(pool: BrowserPool) -> None:
    await _is_replaced_after_a_kill_of(pool, pool.pid)


async def test_72_killed_driver_fails_its_leases_and_the_next_lease_has_another(pool: BrowserPool) -> None:
    await _is_replaced_after_a_kill_of(pool, parent_of(pool.pid))


async def _is_replaced_after_a_kill_of(pool: BrowserPool, victim: int) -> None:
    browser = pool.pid
    async with pool.lease() as first, pool.lease() as second, asyncio.TaskGroup() as group:
        failures = [group.create_task(_failure(tab, _LOOP)) for tab in (first, second)]
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


_KEEP = """(async () => {
  document.cookie = 'mark=kept'; localStorage.mark = sessionStorage.mark = 'kept'; name = 'kept';
  await new Promise((done, fail) => { const open = indexedDB.open('mark');
    open.onsuccess = done; open.onerror = fail });
  await (await caches.open('mark')).put('/mark', new Response('kept'));
  await fetch('/cached');
  window.worker = await navigator.serviceWorker.register('/worker.js').then(() => 'registered', () => 'refused');
})(); 1"""
_FIND = """(async () => { window.found = [document.cookie, localStorage.mark, sessionStorage.mark, name,
  (await indexedDB.databases()).length, (await caches.keys()).length,
  (await navigator.serviceWorker.getRegistrations()).length].join() })(); 1"""


async def test_73_nothing_a_page_keeps_is_in_the_next_context() -> None:
    asked: list[str] = []

    def serve(path: str) -> Resource | None:
        asked.append(path)
        return Resource(PAGE, HTML) if path == "/" else Resource(b"", "text/javascript")

    pool = await BrowserPool.start(Site("https://site.invalid/", {"https://site.invalid": serve}, NO_POLICY), _LIMITS)
    try:
        async with pool.lease() as tab:
            await tab.call("eval", _KEEP)
            await asyncio.sleep(0.5)
            assert await _found(tab) == "mark=kept,kept,kept,kept,1,1,0"  # it was kept where it may be
        before = asked.count("/cached")
        async with pool.lease() as tab:
            assert await _found(tab) == ",,,,0,0,0"
            await tab.call("eval", "fetch('/cached'); 1")
            assert await eventually(lambda: asked.count("/cached") == before + 1)  # asked anew: no cache had it
    finally:
        await pool.aclose()


async def _found(tab: Tab) -> str:
    await tab.call("eval", _FIND)
    await asyncio.sleep(0.3)
    return str(await tab.call("eval", "found"))


@pytest.mark.parametrize(
    "code",
    [
        "localStorage.setItem('a', 'b')",
        "sessionStorage.setItem('a', 'b')",
        "document.cookie = 'a=b'",
        "indexedDB.open('a')",
    ],
)
async def test_73_under_the_strict_policy_a_page_keeps_nothing_at_all(code: str) -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        async with pool.lease() as tab:
            with pytest.raises(TaskError, match=r"SecurityError|sandboxed|denied"):
                await tab.call("eval", code)
    finally:
        await pool.aclose()
