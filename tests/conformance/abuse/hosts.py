"""Attempt 62: a host that does not answer, from the first word on or in the middle of an execution.

The infrastructure failed, so it is told as `SandboxError` or `ConfigError`, in time, and is never a result.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, PalaestraError, SandboxError
from palaestra.sandboxes import Sandbox, SandboxSpec, _box, _bwrap, _containers, open_backend
from palaestra.sandboxes._records import list_leases
from tests.conformance.abuse.scene import Scene, attempt
from tests.sandboxes.daemons import FAULTS, STAGES, bad_daemon, line_to_daemon, served_at

_HERE = ("docker", "jail", "podman")
_GRACE_S = 1.0
_TOLD_S = 6.0
"""Within the deadline: what the execution was given, the grace, and how long a daemon is asked how a box died."""


async def _answers_when_the_host_does(scene: Scene) -> None:
    result = await _run_until_begun(scene.box, lambda: None, wall_s=1.0)
    assert result is None, "a plain execution is a result"


@attempt(62, "host-that-does-not-answer", control=_answers_when_the_host_does, backends=_HERE)
async def _(scene: Scene) -> bool:
    if scene.backend.name == "jail":
        await _tells_of_bad_bubblewrap(scene)
        return await _tells_of_a_jail_that_fails_in_the_middle(scene)
    await _tells_of_bad_daemon(scene.backend.name)
    return await _tells_of_a_line_that_fails_in_the_middle(scene.backend.name)


async def _run_until_begun(box: Sandbox, act: Callable[[], object], *, wall_s: float) -> PalaestraError | None:
    """Act in the middle of an execution; the error that told it, or None for a result."""
    begun = asyncio.Event()
    command = ["sh", "-c", "echo begun; sleep 60"]
    running = asyncio.ensure_future(box.exec(command, on_output=lambda *_: begun.set(), wall_s=wall_s))
    waiting = asyncio.ensure_future(begun.wait())
    try:
        await asyncio.wait([running, waiting], timeout=10.0, return_when=asyncio.FIRST_COMPLETED)
        assert begun.is_set()
        act()
        began_s = time.monotonic()
        await asyncio.wait([running], timeout=20.0)
        assert running.done(), "it waits for ever"
        assert time.monotonic() - began_s < wall_s + _TOLD_S
    finally:
        waiting.cancel()
        running.cancel()
    error = running.exception()
    assert error is None or isinstance(error, SandboxError), error
    return error


async def _tells_of_a_line_that_fails_in_the_middle(name: str) -> bool:
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_box, "_GRACE_S", _GRACE_S)
        patch.setattr(_containers, "_API_TIMEOUT_S", 5)
        patch.setattr(_containers, "_REMOVE_S", 5.0)
        for fault in ("cut", "hang"):
            async with line_to_daemon(name) as line:
                with served_at(name, line.path):
                    backend = await open_backend(name)
                    box = await backend.create(SandboxSpec())
                told.append(await _run_until_begun(box, getattr(line, fault), wall_s=1.0))
                for closing in (box, backend):
                    with contextlib.suppress(PalaestraError, ExceptionGroup):
                        await closing.aclose()
    assert all(isinstance(error, SandboxError) for error in told), told
    return True


async def _tells_of_a_jail_that_fails_in_the_middle(scene: Scene) -> bool:
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_box, "_GRACE_S", _GRACE_S)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            box = await scene.make()
            (handle,) = [lease.handle for lease in list_leases() if lease.id == box.id]
            pid = int(handle.split(":")[1])
            told.append(await _run_until_begun(box, lambda pid=pid, number=number: os.kill(pid, number), wall_s=1.0))  # type: ignore[misc]
    assert all(isinstance(error, SandboxError) for error in told), told
    return True


async def _tells_of_bad_daemon(name: str) -> None:
    async with line_to_daemon(name) as line:
        with served_at(name, line.path):  # the same way, to the real one
            async with await open_backend(name) as backend:
                assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_containers, "_API_TIMEOUT_S", 1)
        for stage in STAGES:
            for fault in FAULTS:
                async with bad_daemon(fault, stage) as path:
                    with served_at(name, path):
                        await _fails_with_a_line(name, f"{stage}: {fault}")


async def _fails_with_a_line(name: str, case: str) -> None:
    async with asyncio.timeout(10.0):
        backend = await open_backend(name)
        try:
            with pytest.raises((SandboxError, ConfigError)) as told:
                await (await backend.create(SandboxSpec())).exec(["true"])
            assert "\n" not in str(told.value), case
        finally:
            with contextlib.suppress(PalaestraError):
                await backend.aclose()


@contextmanager
def _bubblewrap(folder: Path, script: str) -> Iterator[None]:
    program = folder / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bwrap, "_START_S", 0.5)
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


async def _tells_of_bad_bubblewrap(scene: Scene) -> None:
    for script in ("exit 1", "echo no user namespaces >&2; exit 1", "kill -9 $$", "exec sleep 60"):
        with _bubblewrap(scene.folder, script):
            await _fails_with_a_line("jail", script)
    with _bubblewrap(scene.folder, 'PATH="${PATH#*:}"; exec bwrap "$@"'), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_bwrap, "_START_S", 20.0)
        async with await open_backend("jail") as backend:
            assert (await (await backend.create(SandboxSpec())).exec(["true"])).is_ok
