"""Starting browsers: no cage, no browser; no limit, no browser; and nothing is left of a start that was given up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._cgroups import MemoryCgroups, Slot
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, find_chromium, why_no_cage
from palaestra.sandboxes.browser._launch import flags_for
from palaestra.sandboxes.browser._processes import parent_of
from palaestra.sandboxes.doctor import _browser as diagnose_browser
from tests.conftest import require
from tests.sandboxes.hostview import children_of, eventually, traces_of
from tests.sandboxes.pages import NO_POLICY, is_running, require_chromium, site_of

_LIMITS = BrowserConfig(max_tabs=2, num_ready=0)


@pytest.fixture(autouse=True)
def _chromium() -> None:
    require_chromium()


def _running_children() -> set[int]:
    return {pid for pid in children_of(os.getpid()) if is_running(pid)}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of programs that come before the real ones, which whoever has dropped his rights may enter."""
    with tempfile.TemporaryDirectory(prefix="programs-") as directory:
        Path(directory).chmod(0o777)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        yield Path(directory)


def _program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


async def test_without_a_cage_there_is_no_browser_unless_it_is_asked_for(programs: Path) -> None:
    _program(programs, "bwrap", "echo 'No permissions to create new namespace' >&2; exit 1")
    with pytest.raises(
        ConfigError, match=r"cannot be caged: No permissions .*user namespaces.*isolation = 'flags'"
    ) as caught:
        await BrowserPool.start(site_of(), _LIMITS)
    assert "\n" not in str(caught.value)
    finding = diagnose_browser()
    assert (finding.is_ok, "user namespaces" in finding.remedy) == (False, True)
    pool = await BrowserPool.start(site_of(), _LIMITS.model_copy(update={"isolation": "flags"}))
    try:
        assert b"bwrap" not in Path(f"/proc/{pool.pid}/cmdline").read_bytes()
        async with pool.lease() as tab:
            assert await tab.call("twice", 1) == 2
    finally:
        await pool.aclose()


def test_a_missing_bwrap_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chromium = find_chromium()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install bubblewrap" in str(why_no_cage(chromium))


def test_a_probe_that_failed_once_is_tried_again(programs: Path) -> None:
    _program(programs, "bwrap", f"mkdir {programs}/tried 2>/dev/null && exit 1; exit 0")
    assert why_no_cage(find_chromium()) is None
    assert (programs / "tried").is_dir()


def test_doctor_says_that_the_browser_has_a_cage() -> None:
    assert (diagnose_browser().is_ok, "cage" in diagnose_browser().detail) == (True, True)


async def test_a_browser_whose_memory_cannot_be_limited_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MemoryCgroups, memory_mb: int) -> Slot:
        raise OSError(28, "No space left on device")

    probe = await MemoryCgroups.open()
    require("bwrap", None if probe is not None else "no memory cgroup")
    assert probe is not None
    await probe.aclose()
    before = _running_children()
    monkeypatch.setattr(MemoryCgroups, "take", refuse)
    with pytest.raises(SandboxError, match="cannot limit the browser's memory to 3072 MB"):
        await BrowserPool.start(site_of(), _LIMITS)
    assert await eventually(lambda: _running_children() <= before)
    assert traces_of(os.getpid()) == []


async def test_the_driver_has_a_memory_limit_of_its_own() -> None:
    pool = await BrowserPool.start(site_of(), _LIMITS)
    try:
        require("bwrap", None if pool.limits_memory else "no memory cgroup, and the pool says so")
        driver, family = (Path(f"/proc/{pid}/cgroup").read_text() for pid in (parent_of(pool.pid), pool.pid))
        assert "palaestra-" in driver
        assert driver != family
    finally:
        await pool.aclose()


async def test_a_start_that_is_cancelled_leaves_no_process_and_no_folder() -> None:
    before = _running_children()
    for step in range(10):
        start = asyncio.create_task(BrowserPool.start(site_of(), _LIMITS))
        await asyncio.sleep(0.06 * step)  # the moments of a start, one after the other
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await start).aclose()
        assert await eventually(lambda: _running_children() <= before), step
        assert traces_of(os.getpid()) == []


async def test_a_pool_that_closes_while_it_replaces_a_browser_leaves_no_process() -> None:
    before = _running_children()
    for delay_s in (0.0, 0.1, 0.2, 0.3, 0.45):
        pool = await BrowserPool.start(site_of(), _LIMITS)
        os.kill(pool.pid, signal.SIGKILL)
        assert await eventually(lambda pool=pool: pool.pids == [])  # type: ignore[misc]
        lease = asyncio.create_task(pool.acquire())
        await asyncio.sleep(delay_s)
        await pool.aclose()
        with contextlib.suppress(SandboxError):
            await lease
        assert await eventually(lambda: _running_children() <= before), delay_s


async def test_pages_are_clicked_and_pictured_by_default() -> None:
    page = b"<!DOCTYPE html><body><a href='#there' onclick='window.hit = 1'>go</a></body>"
    pool = await BrowserPool.start(site_of(page, NO_POLICY), _LIMITS)
    try:
        async with pool.lease() as tab:
            await tab.run("click", lambda: tab.page.click("a"))  # as the docstring of `run` has it
            assert await tab.call("eval", "hit") == 1
            assert (await tab.run("screenshot", tab.page.screenshot)).startswith(b"\x89PNG")
    finally:
        await pool.aclose()


def test_frames_on_request_is_for_headless_shell_that_was_asked() -> None:
    shell, full = Path("/usr/lib/chromium/chromium-headless-shell"), Path("/usr/lib/chromium/chromium")
    asked = {path: [has for has in (False, True) if _has_frames_on_request(path, has)] for path in (shell, full)}
    assert asked == {shell: [True], full: []}


def _has_frames_on_request(chromium: Path, is_asked: bool) -> bool:
    return "--enable-begin-frame-control" in flags_for(chromium, 32, is_asked)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"memory_mb": 1024}, "max_pss_mb = 2560 must be below memory_mb = 1024"),
        ({"heap_mb": 4096}, "heap_mb = 4096 must be below memory_mb"),
        ({"lifetime_s": 5.0}, "call_timeout_s = 10 must be below lifetime_s = 5"),
        ({"isolation": "none"}, "isolation"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BrowserConfig.parse(limits, source="browser")
