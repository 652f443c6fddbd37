"""Attempts 22 to 25 and 33 to 35: what will not end, what ends oddly, and what it leaves.

Invariant: how long something took is told by the host's clock, never by the server in the box.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from palaestra.sandboxes import Ended, ExecResult
from tests.conformance.abuse.amounts import named
from tests.conformance.abuse.scene import DONE, Scene, attempt
from tests.sandboxes.hostview import eventually, processes_with

_LATE_S = 2.0
"""A machine with much else to do is late by less; what is not ended at all takes minutes."""
_ANSWER_S = 8.0
"""When a box is killed at its deadline, its engine may take so long to say so; its processes must be gone before."""


async def _timed(execution: Awaitable[ExecResult]) -> tuple[ExecResult, float]:
    """A result, and how long it took by the host's clock but for the wait for a turn."""
    began_s = time.monotonic()
    result = await execution
    return result, time.monotonic() - began_s - result.queue_s


_STUBBORN = "for n in (15, 1, 2): signal.signal(n, signal.SIG_IGN)\n"


async def _is_not_ended_by_sigterm(scene: Scene) -> None:
    code = "import signal, time\n" + _STUBBORN + "print('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill()


@attempt(22, "sleeper-that-ignores-sigterm", control=_is_not_ended_by_sigterm)
async def _(scene: Scene) -> bool:
    code = _STUBBORN + 'print("ready", flush=True)\nif os.fork() == 0: os.execvp("sleep", ["sleep", told["name"]])\n'
    running = asyncio.ensure_future(scene.run(code + "time.sleep(60)", name=scene.marker, wall_s=1.0))
    try:
        assert await eventually(lambda: bool(processes_with(f"sleep\0{scene.marker}")))
        seen_s = time.monotonic()
        assert await eventually(lambda: not processes_with(scene.marker), 1.0 + 1.0)  # its deadline, and a second
        result = await running
    finally:
        running.cancel()
    assert time.monotonic() - seen_s < 1.0 + _ANSWER_S
    assert (result.stdout, result.ended) == (b"ready\n", Ended.WALL_TIMEOUT)
    return result.wall_s >= 1.0


_DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(told["closes"]):
            os.close(number)
        os.execvp("sleep", ["sleep", told["name"]])
    os._exit(0)
os.wait()
time.sleep(0.2)
"""


async def _daemon_survives(scene: Scene) -> None:
    scene.ask_plainly(_DAEMON, name=scene.marker, closes=3)
    (pid,) = processes_with(scene.marker)
    os.kill(pid, signal.SIGKILL)
    assert await eventually(lambda: not processes_with(scene.marker))


@attempt(23, "daemon", control=_daemon_survives)
async def _(scene: Scene) -> bool:
    result = await scene.run(_DAEMON, name=scene.marker, closes=3)
    assert result.is_ok
    assert result.num_survivors >= 1
    return processes_with(scene.marker) == []


async def _reader_waits_for_the_daemon(scene: Scene) -> None:
    command = ["sh", "-c", f"setsid sleep {scene.marker} & echo started"]
    with pytest.raises(subprocess.TimeoutExpired) as waited:
        subprocess.run(command, capture_output=True, timeout=0.5)
    assert waited.value.output == b"started\n"
    for pid in processes_with(scene.marker):
        os.kill(pid, signal.SIGKILL)


@attempt(24, "daemon-that-holds-the-output", control=_reader_waits_for_the_daemon)
async def _(scene: Scene) -> bool:
    result, took_s = await _timed(scene.box.exec(["sh", "-c", f"setsid sleep {scene.marker} & echo started"]))
    assert (result.stdout, result.ended, result.num_survivors) == (b"started\n", Ended.EXIT, 1)
    return took_s < _LATE_S and processes_with(scene.marker) == []


_CLOSING = "import os, time\nprint('said', flush=True)\nos.close(1)\nos.close(2)\ntime.sleep(60)"


async def _end_of_output_is_not_the_end(scene: Scene) -> None:
    with subprocess.Popen([sys.executable, "-c", _CLOSING], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"said\n"
        assert process.poll() is None
        process.kill()


@attempt(25, "goes-on-without-output", control=_end_of_output_is_not_the_end)
async def _(scene: Scene) -> bool:
    result, took_s = await _timed(scene.box.run_python(_CLOSING, wall_s=1.0))
    assert (result.stdout, result.ended) == (b"said\n", Ended.WALL_TIMEOUT)
    return 1.0 <= took_s < 1.0 + _LATE_S


_CRASH = """
import resource
def allow():
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
    except ValueError:
        raise PermissionError(errno.EPERM, "") from None
attempt("allow", allow)
pid = os.fork()
if pid == 0:
    os.abort()
status = os.waitpid(pid, 0)[1]
said["signal"], said["dumped"] = os.WTERMSIG(status), os.WCOREDUMP(status)
said["files"] = os.listdir()
"""


async def _dumps(scene: Scene) -> None:
    """A plain process leaves its core in its folder, or the kernel takes it elsewhere; else it tells why not."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    said = scene.ask_plainly(_CRASH)
    if said["allow"] != DONE:
        pytest.skip(f"a hard limit forbids core dumps to this user ({said['allow']}): nothing can dump here")
    if "/" not in pattern and not pattern.startswith("|"):
        assert said["files"], f"no core in the folder: {said}"
    assert said["dumped"], f"core_pattern is {pattern!r}: {said}"


@attempt(33, "core-dump", control=_dumps)
async def _(scene: Scene) -> bool:
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    said = await scene.ask(_CRASH)
    assert (said["signal"], pattern.read_text()) == (signal.SIGABRT, before)
    if scene.is_unsafe:
        return not said["dumped"]
    return not said["dumped"] and said["files"] == [] and said["allow"] != DONE


_ZOMBIES = """
libc.prctl(15, told["name"].encode())
said["own"] = 0
try:
    while said["own"] < 50:
        if os.fork() == 0:
            os._exit(0)
        said["own"] += 1
except OSError as error:
    said["errno"] = errno.errorcode[error.errno]
time.sleep(told["wait_s"])
"""
_ORPHANS = """
libc.prctl(15, told["name"].encode())
said["orphans"] = 0
while said["orphans"] < 1000:
    try:
        pid = os.fork()
        if pid == 0:
            os.fork()
            os._exit(0)
        os.waitpid(pid, 0)
        said["orphans"] += 1
    except BlockingIOError:
        time.sleep(0.002)
"""


async def _stay(scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        plain = group.create_task(asyncio.to_thread(scene.ask_plainly, _ZOMBIES, name=scene.marker, wait_s=2.0))
        assert await eventually(lambda: named(scene.marker) >= 50, 10.0)
    assert plain.result()["own"] == 50


@attempt(34, "zombies", control=_stay)
async def _(scene: Scene) -> bool:
    assert (await scene.ask(_ZOMBIES, name=scene.marker, wait_s=0.0))["own"] == 50
    assert named(scene.marker) == 0
    # more than its limit of processes, one after the other: the server must reap them meanwhile
    patient = await scene.make(wall_s=90.0, cpu_s=90.0)
    assert (await scene.ask(_ORPHANS, box=patient, name=scene.marker))["orphans"] == 1000
    return named(scene.marker) == 0


async def _codes_alone_are_ambiguous(scene: Scene) -> None:
    """What ran out of time and what says so itself look the same to whoever sees the code alone."""
    for of_a_limit, of_the_code in (
        (["timeout", "0.1", "sleep", "60"], "exit 124"),
        (["timeout", "--preserve-status", "-s", "KILL", "0.1", "sleep", "60"], "exit 137"),
    ):
        seen = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *of_a_limit], check=False, stderr=subprocess.DEVNULL)
        said = subprocess.run(["sh", "-c", of_the_code], check=False)
        assert seen.returncode == said.returncode != 0


@attempt(35, "exit-codes-that-look-like-limits", control=_codes_alone_are_ambiguous)
async def _(scene: Scene) -> bool:
    ended = []
    for code in (1, 124, 125, 126, 127, 137, 143, 255):
        result = await scene.box.exec(["sh", "-c", f"exit {code}"])
        ended.append((result.ended, result.exit_code, result.signal) == (Ended.EXIT, code, None))
        assert not result.is_ok
    for number in (6, 9, 11, 15, 24, 25):  # the last two are what the kernel ends at limits of CPU and file size
        result = await scene.box.exec(["sh", "-c", f"kill -{number} $$"])
        ended.append((result.exit_code, result.signal) == (None, number))
        assert result.ended is (Ended.DISK if number == signal.SIGXFSZ else Ended.SIGNAL), result
    began_s = time.monotonic()
    assert (await scene.box.exec(["sh", "-c", "kill -9 0"])).signal == signal.SIGKILL
    assert time.monotonic() - began_s < 2.0
    return all(ended)
