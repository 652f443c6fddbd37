"""Attempt 73: what a page keeps is not in the next context, nor in one beside it.

Everything that is looked for is proved to be kept where nothing stops it: within one context of ours, or in a browser
that nothing holds back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Page

from palaestra.errors import TaskError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Resource, Site, Tab
from tests.sandboxes.hostview import eventually
from tests.sandboxes.pages import HTML, NO_POLICY, PAGE, WebServer, require_chromium, site_of, unguarded

_LIMITS = BrowserConfig(max_tabs=4, num_ready=0, call_timeout_s=5.0)
_ORIGIN = "http://localhost"  # which browsers trust like https: it may use all that keeps anything

_KEEP = """(async () => {
  document.cookie = 'mark=kept'; localStorage.mark = sessionStorage.mark = 'kept'; name = 'kept';
  await new Promise((done, fail) => { const open = indexedDB.open('mark');
    open.onsuccess = done; open.onerror = fail });
  await (await caches.open('mark')).put('/mark', new Response('kept'));
  await (await fetch('/cached')).text(); await (await fetch('/cached')).text();
  window.worker = await navigator.serviceWorker.register('/worker.js').then(() => 'registered', () => 'refused');
})(); 1"""
_FIND = """(async () => { window.found = [document.cookie, localStorage.mark, sessionStorage.mark, name,
  (await indexedDB.databases()).length, (await caches.keys()).length,
  (await navigator.serviceWorker.getRegistrations()).length].join() })(); 1"""
_SECRET = "secret-of-one-lease"
_FIELDS = f"<!DOCTYPE html><body><input id=from value={_SECRET}><textarea id=to></textarea></body>".encode()
_FRAME = "(() => { document.body.appendChild(document.createElement('iframe')).src = '/' })()"
_COPIES = {
    "keys": "",
    "a frame's keys": "",
    "a frame's interface": f"navigator.clipboard.writeText('{_SECRET}')",
    "command": "document.execCommand('copy')",
    "cut": "document.execCommand('cut')",
    "handler": "addEventListener('copy', (event) => { event.preventDefault();"
    f" event.clipboardData.setData('text/plain', '{_SECRET}') }}, true); document.execCommand('copy')",
    "interface": f"navigator.clipboard.writeText('{_SECRET}')",
    "a new document": f"""(() => {{ Event.prototype.preventDefault = () => {{}};
      Event.prototype.stopImmediatePropagation = () => {{}}; document.open();
      document.write('<input id=from value={_SECRET}>'); document.close();
      document.getElementById('from').select(); document.execCommand('copy') }})()""",
}


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture
async def fields() -> AsyncIterator[BrowserPool]:
    """Tabs that show two fields, one of which has text."""
    pool = await BrowserPool.start(site_of(_FIELDS, NO_POLICY, _ORIGIN), _LIMITS)
    yield pool
    await pool.aclose()


async def test_73_nothing_a_page_keeps_is_in_the_next_context() -> None:
    asked: list[str] = []

    def serve(path: str) -> Resource | None:
        asked.append(path)
        return Resource(PAGE, HTML) if path == "/" else Resource(b"", "text/javascript")

    pool = await BrowserPool.start(Site(f"{_ORIGIN}/", {_ORIGIN: serve}, NO_POLICY), _LIMITS)
    try:
        async with pool.lease() as tab:
            await tab.call("eval", _KEEP)
            await tab.run("wait", lambda: tab.page.wait_for_function("window.worker !== undefined"))
            assert await _found(tab) == "mark=kept,kept,kept,kept,1,1,0"  # it was kept where it may be
        assert "/worker.js" not in asked  # Playwright's answer to `register` is a promise of nothing
        assert asked.count("/cached") == 2  # no cache within a context, so there is none between two
        async with pool.lease() as tab:
            assert await _found(tab) == ",,,,0,0,0"
            await tab.call("eval", "fetch('/cached'); 1")
            assert await eventually(lambda: asked.count("/cached") == 3)
    finally:
        await pool.aclose()


async def test_73_an_unguarded_context_keeps_it_all() -> None:
    stays = {"Cache-Control": "max-age=3600"}
    answers = {
        "/": (200, {"Content-Type": HTML}, PAGE),
        "/cached": (200, stays, b"x"),
        "/worker.js": (200, {"Content-Type": "text/javascript"}, b""),
    }
    async with unguarded() as browser, WebServer(answers) as server:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(server.url)
        await page.evaluate(_KEEP)
        await page.wait_for_function("window.worker !== undefined")
        assert await page.evaluate("worker") == "registered"
        assert server.asked.count("/cached") == 1  # the second time it came from the cache
        again = await context.new_page()
        await again.goto(server.url)
        await again.evaluate(_FIND)
        await again.wait_for_function("window.found !== undefined")
        assert await again.evaluate("found") == "mark=kept,kept,,,1,1,1"
        await again.evaluate("fetch('/cached').then((reply) => reply.text())")
        assert server.asked.count("/cached") == 1


async def _found(tab: Tab) -> str:
    await tab.call("eval", _FIND)
    await asyncio.sleep(0.3)
    return str(await tab.call("eval", "found"))


@pytest.mark.parametrize("way", list(_COPIES))
async def test_73_nothing_is_copied_from_one_lease_into_another(fields: BrowserPool, way: str) -> None:
    async with fields.lease() as beside:
        async with fields.lease() as tab:
            await tab.run("copy", lambda: _copy(tab.page, way))
            assert await beside.run("paste", lambda: _pasted(beside.page)) == ""
        async with fields.lease() as following:
            assert await following.run("paste", lambda: _pasted(following.page)) == ""


@pytest.mark.parametrize("way", list(_COPIES))
async def test_73_contexts_of_an_unguarded_browser_share_the_clipboard(way: str) -> None:
    async with unguarded() as browser, WebServer({"/": (200, {"Content-Type": HTML}, _FIELDS)}) as server:
        pages = [await (await browser.new_context()).new_page() for _ in range(2)]
        for page in pages:
            await page.context.grant_permissions(["clipboard-write"])
            await page.goto(server.url)
        await _copy(pages[0], way)
        assert await _pasted(pages[1]) == _SECRET


async def _copy(page: Page, way: str) -> None:
    """By keys or by code, in a document that its user has just touched."""
    frame = page.main_frame
    if way.startswith("a frame's"):
        await page.evaluate(_FRAME)
        await page.wait_for_selector("iframe")
        frame = page.frames[-1]
    await frame.click("#from")
    await page.keyboard.press("Control+A")
    if _COPIES[way]:
        with contextlib.suppress(PlaywrightError):  # it is refused
            await frame.evaluate(_COPIES[way])
    else:
        await page.keyboard.press("Control+C")
    await asyncio.sleep(0.1)


async def _pasted(page: Page) -> str:
    await page.focus("#to")
    await page.keyboard.press("Control+V")
    return str(await page.evaluate("document.getElementById('to').value"))


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
