"""Attempt 64: files of the host and Chromium's own pages, asked for by the page, by an agent and past every check.

Each is proved to be read in a browser that nothing holds back; and the cage is proved to hold by itself, with the
filter on requests taken away.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Page

from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Tab
from tests.sandboxes.pages import NO_POLICY, bystander, require_chromium, site_of, unguarded

_LIMITS = BrowserConfig(max_tabs=4, num_ready=0)
_SECRET = "palaestra-planted-secret"
_SCHEMES = ["file:", "view-source:file:", "chrome:"]
_CHROME_PAGE = "chrome://blob-internals"  # one that headless shell has too


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture
def planted() -> Iterator[Path]:
    """A file that anybody on the host may read, in a folder that anybody may enter."""
    path = Path(f"/var/tmp/palaestra-planted-{os.getpid()}.txt")
    path.write_text(_SECRET)
    path.chmod(0o644)
    yield path
    path.unlink()


def _address(scheme: str, file: Path) -> str:
    return _CHROME_PAGE if scheme == "chrome:" else f"{scheme}//{file}"


async def _text_at(page: Page, url: str) -> str:
    """What a navigation of Playwright's, which no check of ours sees, shows; its error where it shows nothing."""
    try:
        await page.goto(url, timeout=3000)
    except PlaywrightError as error:
        return f"refused: {error}"
    return str(await page.evaluate("document.documentElement.innerText"))


async def _shown(tab: Tab, url: str) -> str:
    return await tab.run("goto", lambda: _text_at(tab.page, url))


@pytest.mark.parametrize("scheme", _SCHEMES)
async def test_64_a_page_opens_no_file_and_no_internal_page(scheme: str, planted: Path) -> None:
    url = _address(scheme, planted)
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS)
    try:
        async with bystander(pool), pool.lease() as tab:
            with pytest.raises(ValueError, match="of no origin"):
                await tab.goto(url)
            await tab.call("eval", f"open({url!r}); location = {url!r}; 1")
            await asyncio.sleep(0.3)
            forbidden = ("file:", "chrome:", "view-source:")
            assert [page.url for page in tab.page.context.pages if page.url.startswith(forbidden)] == []
    finally:
        await pool.aclose()


@pytest.mark.parametrize("scheme", _SCHEMES[:2])
@pytest.mark.parametrize("has_filter", [True, False], ids=["filter", "cage alone"])
async def test_64_a_navigation_past_the_check_finds_no_file(scheme: str, has_filter: bool, planted: Path) -> None:
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS)
    try:
        async with bystander(pool), pool.lease() as tab:
            if not has_filter:
                await tab.page.context.unroute_all()
            shown = await _shown(tab, _address(scheme, planted))
        assert _SECRET not in shown
        if scheme == "file:":
            assert ("ERR_BLOCKED_BY_CLIENT" if has_filter else "ERR_FILE_NOT_FOUND") in shown
    finally:
        await pool.aclose()


async def test_64_an_internal_page_past_the_check_shows_nothing_of_another_lease() -> None:
    keep = "window.kept = new Blob(['x'.repeat(1000)], {type: 'palaestra/secret'}); kept.size"
    pool = await BrowserPool.start(site_of(policy=NO_POLICY), _LIMITS)
    try:
        async with pool.lease() as other, pool.lease() as tab:
            assert await other.call("eval", keep) == 1000
            assert "palaestra/secret" in await _shown_beside(other)
            assert "palaestra/secret" not in await _shown(tab, _CHROME_PAGE)
    finally:
        await pool.aclose()


async def _shown_beside(tab: Tab) -> str:
    return await _text_at(await tab.page.context.new_page(), _CHROME_PAGE)


@pytest.mark.parametrize("scheme", _SCHEMES)
async def test_64_an_unguarded_browser_shows_it(scheme: str, planted: Path) -> None:
    async with unguarded() as browser:
        shown = await _text_at(await browser.new_page(), _address(scheme, planted))
        assert (_SECRET if scheme != "chrome:" else "blob") in shown
