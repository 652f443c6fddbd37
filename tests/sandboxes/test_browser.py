"""The browser pool: fresh contexts, leases that are bounded and end whole, sites, limits."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, SandboxError, TaskError
from palaestra.sandboxes._cgroups import MemoryCgroups
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Resource, Site, TabError, find_chromium
from palaestra.sandboxes.browser._site import Serve
from tests.conftest import require
from tests.sandboxes.hostview import eventually
from tests.sandboxes.pages import HTML, PAGE, require_chromium, site_of

_LIMITS = BrowserConfig(max_tabs=2, num_ready=0, lease_timeout_s=0.5, call_timeout_s=2.0)


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture
async def pool() -> AsyncIterator[BrowserPool]:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    yield pool
    await pool.aclose()


async def test_each_lease_has_a_context_that_nobody_used(pool: BrowserPool) -> None:
    async with pool.lease() as tab:
        assert await tab.call("twice", 21) == 42
        await tab.call("eval", "window.kept = 1")
        assert (pool.num_leased, await pool.num_contexts()) == (1, 1)
    assert (pool.num_leased, await pool.num_contexts()) == (0, 0)
    async with pool.lease() as other:
        assert other is not tab
        assert await other.call("eval", "typeof kept") == "undefined"
    with pytest.raises(SandboxError, match="lease has ended"):
        await tab.call("twice", 1)


async def test_lease_waits_and_gives_up(pool: BrowserPool) -> None:
    first, second = await pool.acquire(), await pool.acquire()
    with pytest.raises(SandboxError, match="no browser tab came free"):
        await pool.acquire()
    await pool.release(first)
    await pool.release(first)  # a second release of the same lease does nothing
    third = await pool.acquire()
    with pytest.raises(SandboxError, match="no browser tab came free"):
        await pool.acquire()
    for tab in (second, third):
        await pool.release(tab)


async def test_a_lease_takes_a_tab_that_was_opened_before_and_another_is_opened() -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS.model_copy(update={"num_ready": 2}))
    try:
        assert await eventually(lambda: len(pool._ready) == 2)
        ready = list(pool._ready)
        async with pool.lease() as tab:
            assert tab in ready
            assert await eventually(lambda: len(pool._ready) == 2)
            assert await pool.num_contexts() == 3
        assert await pool.num_contexts() == 2
    finally:
        await pool.aclose()


async def test_cancelled_lease_leaves_no_context(pool: BrowserPool) -> None:
    for step in range(12):
        lease = asyncio.create_task(pool.acquire())
        await asyncio.sleep(0.02 * step)  # the moments of an opening, one after the other
        lease.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pool.release(await lease)
        assert await eventually(lambda: pool._num_opening == 0)
        await pool._enders.join()
        assert (pool.num_leased, await pool.num_contexts()) == (0, 0)
    async with pool.lease(), pool.lease():
        assert await pool.num_contexts() == 2


async def test_cancelled_release_still_closes_the_tab(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    release = asyncio.create_task(pool.release(tab))
    await asyncio.sleep(0)
    release.cancel()
    with pytest.raises(asyncio.CancelledError):
        await release
    await pool._enders.join()
    assert await pool.num_contexts() == 0
    async with pool.lease(), pool.lease():  # both places are free again
        pass


async def test_code_that_throws_breaks_its_tab(pool: BrowserPool) -> None:
    async with pool.lease() as tab:
        with pytest.raises(TaskError, match="nothing is not defined"):
            await tab.call("nothing")
        assert tab.is_broken


async def test_cancelled_call_breaks_its_tab(pool: BrowserPool) -> None:
    async with pool.lease() as tab:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await tab.call("eval", "while (true) {}")
        assert tab.is_broken


async def test_closed_page_is_not_the_browsers_doing(pool: BrowserPool) -> None:
    async with pool.lease() as tab:
        await tab.page.close()
        with pytest.raises(TabError, match="was closed") as caught:
            await tab.call("twice", 1)
        assert (caught.value.by, caught.value.ended) == ("page", "closed")


async def test_strict_policy_opens_no_popup_and_no_dialog(pool: BrowserPool) -> None:
    async with pool.lease() as tab:
        code = "window.open('/') === null && confirm('sure?') === false && alert('x') === undefined"
        assert await tab.call("eval", code)
        assert len(tab.page.context.pages) == 1


async def test_site_serves_its_origins_and_no_other() -> None:
    asked: list[str] = []

    def serve(path: str) -> Resource | None:
        asked.append(path)
        return Resource(b"window.loaded = 1", "text/javascript") if path == "/part.js" else None

    page = (
        PAGE
        + b"<script src='http://parts.invalid/part.js?x=1#y'></script><script src='http://no.invalid/no.js'></script>"
    )
    origins: dict[str, Serve] = {"http://site.invalid": {"/": Resource(page, HTML)}.get, "http://parts.invalid": serve}
    pool = await BrowserPool.start(Site("http://site.invalid/", origins), _LIMITS)
    try:
        async with pool.lease() as tab:
            assert await tab.call("eval", "loaded") == 1
            await tab.goto("http://site.invalid/")
            with pytest.raises(ValueError, match="of no origin"):
                await tab.goto("http://no.invalid/")
        assert asked == ["/part.js", "/part.js"]
    finally:
        await pool.aclose()


@pytest.mark.parametrize(
    "url", ["http://site.invalid.evil/", "http://a@site.invalid/", "https://site.invalid/", "http://[", ""]
)
def test_lookalike_origins_are_refused(url: str) -> None:
    assert site_of().find("http://site.invalid/?a#b") is not None
    assert site_of().find(url) is None


def test_start_of_no_origin_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="of no origin"):
        Site("http://a.invalid/", {"http://b.invalid": lambda _: None})


async def test_pool_says_when_it_cannot_limit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> None:
        return None

    monkeypatch.setattr(MemoryCgroups, "open", refuse)
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        assert not pool.limits_memory
        async with pool.lease() as tab:
            assert await tab.call("twice", 1) == 2
    finally:
        await pool.aclose()


async def test_pool_in_a_cgroup_says_so_and_has_all_its_processes_there(pool: BrowserPool) -> None:
    require("bwrap", None if pool.limits_memory else "no memory cgroup, and the pool says so")
    [own] = [
        line for line in Path(f"/proc/{pool.pid}/cgroup").read_text().splitlines() if "memory" in line or "0::" in line
    ][:1]
    assert "palaestra-" in own


def test_failures_pickle() -> None:
    failure = pickle.loads(pickle.dumps(TabError("gone", "page", "oom")))
    assert (str(failure), failure.by, failure.ended) == ("gone", "page", "oom")


def test_missing_chromium_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get install chromium"):
        find_chromium({"PATH": str(tmp_path)})
    with pytest.raises(ConfigError, match="not an executable"):
        find_chromium({"PALAESTRA_CHROMIUM": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match="not an executable file"):
        find_chromium({"PALAESTRA_CHROMIUM": str(tmp_path)})
