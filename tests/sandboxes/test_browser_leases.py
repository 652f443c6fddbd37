"""Browsers and tabs on the host's list: who holds them, for how long, and what is cleared after a killed owner."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._folders import orphans
from palaestra.sandboxes._owner import this_owner
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, TabError
from palaestra.sandboxes.browser._processes import family_of, parent_of
from palaestra.sandboxes.leases import list_leases, reap
from tests.sandboxes.hostview import eventually
from tests.sandboxes.pages import HTML, PAGE, failure_of, is_running, require_chromium, site_of

PREFIX = "palaestra-browser-"

_LIMITS = BrowserConfig(max_tabs=2, num_ready=0, call_timeout_s=0.5, load_timeout_s=0.9, lifetime_s=1.0)


@pytest.fixture(autouse=True)
def _own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list, and temporary folders, of these tests alone."""
    require_chromium()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
async def pool() -> AsyncIterator[BrowserPool]:
    pool = await BrowserPool.start(site_of(), BrowserConfig(max_tabs=2, num_ready=0, lifetime_s=50.0), label="a run")
    yield pool
    await pool.aclose()


def _listed() -> list[str]:
    return [lease.handle.split()[0] for lease in list_leases()]


async def test_a_browser_and_its_leases_are_on_the_list_until_they_end(pool: BrowserPool) -> None:
    [browser] = list_leases()
    assert (browser.backend, browser.label, browser.owner_pid) == ("browser", "a run", os.getpid())
    assert browser.handle.split(":")[1] == str(pool.pid)
    async with pool.lease():
        [lease] = [lease for lease in list_leases() if lease.id != browser.id]
        assert (lease.backend, lease.label, lease.owner_pid) == ("browser", "a run", os.getpid())
        assert (lease.handle, lease.lifetime_s) == (f"tab {browser.id}", 50.0)
        assert reap() == []  # nothing of a living owner is touched
    assert list_leases() == [browser]
    await pool.aclose()
    assert list_leases() == []


async def test_a_browser_that_died_is_off_the_list_and_the_next_one_on_it(pool: BrowserPool) -> None:
    [first] = list_leases()
    os.kill(pool.pid, signal.SIGKILL)
    assert await eventually(lambda: list_leases() == [])
    async with pool.lease():
        assert sorted(_listed()) == ["process", "tab"]
        assert first.id not in [lease.id for lease in list_leases()]


async def test_a_list_that_cannot_be_kept_leaves_no_tab_leased(
    pool: BrowserPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as context:
        context.setenv("TMPDIR", str(tmp_path / "nothing"))
        with pytest.raises(ConfigError, match="set TMPDIR"):
            await pool.acquire()
    await pool._enders.join()
    assert (pool.num_leased, await pool.num_contexts()) == (0, 0)
    async with pool.lease(), pool.lease():
        pass


async def test_a_lease_beyond_its_lifetime_is_ended_and_ours() -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        first, second = await pool.acquire(), await pool.acquire()
        assert await eventually(lambda: first.failure is not None and second.failure is not None)
        failure = await failure_of(first, "1")
        assert (failure.by, failure.ended) == ("browser", "lifetime")
        assert await eventually(lambda: _listed() == ["process"])
        assert (pool.num_leased, await pool.num_contexts()) == (0, 0)
        async with pool.lease(), pool.lease():  # its place is free again
            await pool.release(first)  # late, and harmless
            assert pool.num_leased == 2
    finally:
        await pool.aclose()


async def test_a_call_under_way_ends_with_the_lifetime() -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        async with pool.lease() as tab:
            with pytest.raises(TabError, match="lease is over after 1 s"):
                await tab.run("wait", lambda: tab.page.wait_for_selector("none"), timeout_s=10.0)
    finally:
        await pool.aclose()


async def test_a_renewed_lease_lives_on() -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        async with pool.lease() as tab:
            for _ in range(4):
                await asyncio.sleep(0.5)
                pool.renew(tab)
            assert await tab.call("twice", 2) == 4
            assert await eventually(lambda: tab.failure is not None)
            pool.renew(tab)  # what has ended stays ended
            with pytest.raises(SandboxError):
                await tab.call("twice", 2)
    finally:
        await pool.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["bwrap", "flags"])
async def test_what_a_killed_owner_left_is_reaped(isolation: str, tmp_path: Path) -> None:
    program = (
        "import asyncio, tempfile\n"
        "from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Resource, Site\n"
        "async def main():\n"
        f"    page = {{'/': Resource({PAGE!r}, {HTML!r})}}\n"
        f"    config = BrowserConfig(isolation={isolation!r})\n"
        "    site = Site('http://site.invalid/', {'http://site.invalid': page.get})\n"
        "    pool = await BrowserPool.start(site, config)\n"
        "    await pool.acquire()\n"
        "    print(pool.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, env=environment
    )
    assert owner.stdout is not None
    async with asyncio.timeout(60.0):
        browser = int(await owner.stdout.readline())
    driver, family = parent_of(browser), family_of(browser)
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == (isolation == "flags")  # a caged one keeps nothing outside
    for pid in (driver, owner.pid):  # the driver first: it would clear up for a dead owner
        os.kill(pid, signal.SIGSTOP)
    for pid in (owner.pid, driver):
        os.kill(pid, signal.SIGKILL)
    await owner.wait()
    assert sorted(_listed()) == ["process", "tab"]
    cleared = reap()
    assert [each.error for each in cleared if each.error] == []
    assert _listed() == []
    assert await eventually(lambda: not any(map(is_running, family)), timeout_s=10.0)
    await asyncio.to_thread(reap)  # a browser that was just dying may have written once more
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


async def test_a_tab_that_a_living_owner_does_not_end_is_told_and_left(pool: BrowserPool) -> None:
    async with pool.lease():
        [lease] = [lease for lease in list_leases() if lease.handle.startswith("tab ")]
        for reaped in reap(now_s=lease.began_s + 10_000.0):
            if reaped.what.endswith(lease.id):
                assert "its owner lives" in reaped.error
        assert "tab" in _listed()


def test_only_folders_of_the_dead_are_orphans(tmp_path: Path) -> None:
    boot, _, _, namespace = this_owner().split(":")
    owners = {"mine": this_owner(), "odd": "nobody", "dead": f"{boot}:1:7:{namespace}"}
    for name, owner in owners.items():
        (tmp_path / f"{PREFIX}{name}").mkdir()
        (tmp_path / f"{PREFIX}{name}" / ".owner").write_text(owner)
    (tmp_path / f"{PREFIX}new").mkdir()
    assert orphans() == [tmp_path / f"{PREFIX}dead"]
