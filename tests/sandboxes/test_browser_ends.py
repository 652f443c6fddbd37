"""How browsers end: worn, hung, killed too often, closed, or with the harness; and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from palaestra.errors import SandboxError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, TabError
from palaestra.sandboxes.browser._processes import family_of, parent_of
from tests.sandboxes.hostview import eventually, traces_of
from tests.sandboxes.pages import HTML, PAGE, is_running, require_chromium, site_of

_LIMITS = BrowserConfig(max_tabs=2, num_ready=0, call_timeout_s=1.0, close_timeout_s=1.0)


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders of each test alone, which other workers do not fill."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def _folders() -> list[str]:
    return [each.name for each in Path(tempfile.gettempdir()).iterdir() if "leases" not in each.name]


def _limits(**changes: object) -> BrowserConfig:
    return _LIMITS.model_copy(update=changes)


async def test_worn_browser_serves_its_leases_to_the_end_and_another_the_next() -> None:
    pool = await BrowserPool.start(site_of(), _limits(leases_per_browser=1))
    try:
        first = pool.pid
        async with pool.lease() as old:
            async with pool.lease() as new:
                assert pool.pid != first
                assert pool.pids == sorted([first, pool.pid])
                assert [await tab.call("twice", 2) for tab in (old, new)] == [4, 4]
            assert await old.call("twice", 3) == 6
        assert await eventually(lambda: not is_running(first) and pool.pids == [pool.pid])
    finally:
        await pool.aclose()


async def test_browser_above_its_memory_cap_is_replaced() -> None:
    pool = await BrowserPool.start(site_of(), _limits(max_pss_mb=32))
    try:
        first = pool.pid
        for _ in range(10):  # its memory is looked at once in ten leases
            async with pool.lease():
                assert pool.pid == first
        async with pool.lease():
            assert pool.pid != first
        assert await eventually(lambda: not is_running(first))
    finally:
        await pool.aclose()


async def test_browser_that_dies_too_often_is_not_started_again() -> None:
    pool = await BrowserPool.start(site_of(), _limits(max_restarts=1, restart_window_s=30.0))
    try:
        for _ in range(2):
            async with pool.lease() as tab:
                os.kill(pool.pid, signal.SIGKILL)
                with pytest.raises(TabError, match="browser process died"):
                    await tab.call("eval", "while (true) {}")
        with pytest.raises(SandboxError, match=r"failed 2 times within 30 s.*browser process died"):
            await pool.acquire()
        assert pool.num_leased == 0
    finally:
        await pool.aclose()


@pytest.mark.parametrize("which", ["browser", "driver"])
async def test_stopped_browser_is_not_the_pages_doing_and_is_killed(which: str) -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        first = pool.pid
        async with pool.lease() as tab:
            for pid in family_of(first) if which == "browser" else [parent_of(first)]:
                os.kill(pid, signal.SIGSTOP)
            async with asyncio.timeout(8.0):
                with pytest.raises(TabError) as caught:
                    await tab.call("twice", 1)
            assert caught.value.by == "browser"
        assert await eventually(lambda: not is_running(first))
        async with pool.lease() as tab:
            assert await tab.call("twice", 2) == 4
    finally:
        await pool.aclose()


async def test_nothing_is_left_after_close() -> None:
    pool = await BrowserPool.start(site_of(), _limits(num_ready=1))
    family = [parent_of(pool.pid), *family_of(pool.pid)]
    assert len(family) > 3
    tab = await pool.acquire()
    await pool.aclose()
    await pool.aclose()
    assert await eventually(lambda: not any(map(is_running, family)))
    assert _folders() == []
    assert traces_of(os.getpid()) == []
    await pool.release(tab)  # late, and harmless
    with pytest.raises(SandboxError, match="closed"):
        await pool.acquire()


async def test_nothing_is_left_of_a_browser_whose_driver_was_killed() -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    family = family_of(pool.pid)
    os.kill(parent_of(pool.pid), signal.SIGKILL)
    try:
        assert await eventually(lambda: not any(map(is_running, family)))
    finally:
        await pool.aclose()
    assert _folders() == []
    assert traces_of(os.getpid()) == []


@pytest.mark.slow
async def test_nothing_is_left_after_the_parent_is_killed() -> None:
    program = (
        "import asyncio\nfrom palaestra.sandboxes.browser import BrowserPool, Resource, Site\n"
        "async def main():\n"
        f"    page = {{'/': Resource({PAGE!r}, {HTML!r})}}\n"
        "    pool = await BrowserPool.start(Site('http://site.invalid/', {'http://site.invalid': page.get}))\n"
        "    await pool.acquire()\n"
        "    print(pool.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(60.0):
        browser = int(await parent.stdout.readline())
    family = [parent_of(browser), *family_of(browser)]
    assert len(family) > 3
    parent.kill()
    await parent.wait()
    assert await eventually(lambda: not any(map(is_running, family)), timeout_s=10.0)
    assert await eventually(lambda: _folders() == [] and traces_of(parent.pid) == [])
