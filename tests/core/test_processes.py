"""The contract of worker processes, on real children that misbehave on demand."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from palaestra.errors import ConfigError, LedgerError, WorkerError
from palaestra.processes import WorkerProcess

CALL_S = 20.0
SOON_S = 5.0

SERVICE = """
import os, signal, socket, subprocess, sys, time
from palaestra.errors import ConfigError, LedgerError


class Unreadable:
    def __reduce__(self):
        return (int, ("no number",))


class Service:
    def __init__(self, config):
        self.config, self.later, self.slices = config, [], 0

    def handle(self, method, args, reply):
        getattr(self, method)(reply, *args)

    def work(self):
        self.slices += 1
        if self.slices == self.config.get("crash_at"):
            raise RuntimeError("crashed while working")
        if self.later:
            self.later.pop(0).send(self.slices)
        return bool(self.later)

    def close(self):
        if self.config.get("hang_at_close"):
            time.sleep(600)
        if "closed" in self.config:
            open(self.config["closed"], "w").close()

    def echo(self, reply, value): reply.send(value)
    def delay(self, reply): self.later.append(reply)
    def hold(self, reply): pass
    def count(self, reply): reply.send(self.slices)
    def ours(self, reply): reply.fail(LedgerError("our own"))
    def bug(self, reply): raise KeyError("a bug")
    def lambda_(self, reply): reply.send(lambda: None)
    def unreadable(self, reply): reply.send(Unreadable())
    def leave(self, reply): print("last words", flush=True); os._exit(3)
    def environ(self, reply, name): reply.send(os.environ.get(name))
    def path(self, reply): reply.send(sys.path[0])
    def note(self, reply, path): open(path, "w").close(); reply.send(None)

    def spawn(self, reply):
        reply.send(subprocess.Popen(["sleep", "600"]).pid)

    def fork(self, reply):
        child = os.fork()  # the fork keeps the socket open
        if child == 0:
            time.sleep(600)
        reply.send(child)


def build(config):
    if config.get("refuse"):
        raise ConfigError(config["refuse"])
    if config.get("broken"):
        raise ZeroDivisionError("broken at start")
    if config.get("hang"):
        time.sleep(600)
    return Service(config)
"""


@pytest.fixture
def service_path(tmp_path: Path) -> Path:
    """A folder, outside the checkout, that holds the module `misbehaving`."""
    (tmp_path / "misbehaving.py").write_text(textwrap.dedent(SERVICE))
    return tmp_path


def paths_with(folder: Path) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{inherited}" if inherited else str(folder)}


async def start(
    folder: Path, *, start_timeout_s: float = CALL_S, target: str = "build", **config: Any
) -> WorkerProcess:
    return await WorkerProcess.start(
        f"misbehaving:{target}",
        config,
        name="worker",
        log_path=folder / "logs" / "worker.log",
        start_timeout_s=start_timeout_s,
        env=paths_with(folder),
    )


@asynccontextmanager
async def running(folder: Path, **config: Any) -> AsyncIterator[WorkerProcess]:
    async with await start(folder, **config) as worker:
        yield worker


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(SOON_S):
        while is_alive(pid):
            await asyncio.sleep(0.01)


async def test_answers_come_back_to_their_own_calls(service_path: Path) -> None:
    async with running(service_path) as worker, asyncio.TaskGroup() as group:
        values = [group.create_task(worker.call("echo", [i] * i, timeout_s=CALL_S)) for i in range(50)]
    assert [value.result() for value in values] == [[i] * i for i in range(50)]


async def test_large_values_pass_whole(service_path: Path) -> None:
    blob = os.urandom(3_000_000)
    async with running(service_path) as worker:
        assert await worker.call("echo", blob, timeout_s=CALL_S) == blob


async def test_a_service_may_answer_later_and_works_only_while_it_has_work(service_path: Path) -> None:
    async with running(service_path) as worker:
        async with asyncio.TaskGroup() as group:
            slices = [group.create_task(worker.call("delay", timeout_s=CALL_S)) for _ in range(5)]
        assert len({task.result() for task in slices}) == 5
        idle = await worker.call("count", timeout_s=CALL_S)
        await asyncio.sleep(0.05)
        assert await worker.call("count", timeout_s=CALL_S) <= idle + 1  # one slice per call, none in between


async def test_errors_of_ours_arrive_as_themselves_and_others_as_worker_errors(service_path: Path) -> None:
    async with running(service_path) as worker:
        with pytest.raises(LedgerError, match="our own"):
            await worker.call("ours", timeout_s=CALL_S)
        with pytest.raises(WorkerError, match="KeyError: 'a bug'"):
            await worker.call("bug", timeout_s=CALL_S)
        with pytest.raises(WorkerError, match="pickle"):
            await worker.call("lambda_", timeout_s=CALL_S)
        assert await worker.call("echo", 1, timeout_s=CALL_S) == 1
    assert "a bug" in worker.log_path.read_text()


async def test_an_answer_that_cannot_be_unpickled_fails_its_call_alone(service_path: Path) -> None:
    async with running(service_path) as worker:
        with pytest.raises(WorkerError, match="cannot be unpickled: ValueError"):
            await worker.call("unreadable", timeout_s=CALL_S)
        assert await worker.call("echo", 1, timeout_s=CALL_S) == 1


async def test_a_deadline_fails_one_call_and_a_late_answer_is_dropped(service_path: Path) -> None:
    async with running(service_path) as worker:
        with pytest.raises(WorkerError, match=r"did not answer 'hold' within 0\.05 s"):
            await worker.call("hold", timeout_s=0.05)
        assert await worker.call("echo", 1, timeout_s=CALL_S) == 1


async def test_a_cancelled_call_leaves_the_worker_usable(service_path: Path) -> None:
    async with running(service_path) as worker:
        call = asyncio.create_task(worker.call("hold", timeout_s=CALL_S))
        await worker.call("echo", 1, timeout_s=CALL_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await worker.call("echo", 2, timeout_s=CALL_S) == 2


async def test_notify_calls_without_an_answer(service_path: Path) -> None:
    mark = service_path / "mark"
    async with running(service_path) as worker:
        worker.notify("note", str(mark))
        await worker.call("echo", 1, timeout_s=CALL_S)
        assert mark.exists()
        worker.notify("bug")
        assert await worker.call("echo", 2, timeout_s=CALL_S) == 2
    worker.notify("note", str(mark))  # dead by now: nothing happens


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"refuse": "no such model"}, ConfigError, "^no such model$"),
        ({"broken": True}, WorkerError, "ZeroDivisionError: broken at start"),
        ({"target": "nothing"}, WorkerError, "AttributeError"),
        ({"hang": True, "start_timeout_s": 0.5}, WorkerError, r"did not start within 0\.5 s"),
    ],
)
async def test_a_failed_start_says_why(
    service_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await start(service_path, **config)


async def test_a_cancelled_start_leaves_no_process(service_path: Path) -> None:
    before = children()
    task = asyncio.create_task(start(service_path, hang=True))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == before


def children() -> set[str]:
    """Living children of this process."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_death_fails_all_pending_calls_at_once_with_the_last_words(service_path: Path) -> None:
    async with running(service_path) as worker:
        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
            pending = [group.create_task(_error_of(worker, "hold")) for _ in range(3)]
            pending.append(group.create_task(_error_of(worker, "leave")))
        for task in pending:
            assert "ended with 3" in str(task.result())
            assert "last words" in str(task.result())
        with pytest.raises(WorkerError, match="ended with 3"):
            await worker.call("echo", 1, timeout_s=CALL_S)


async def _error_of(worker: WorkerProcess, method: str) -> WorkerError:
    with pytest.raises(WorkerError) as caught:
        await worker.call(method, timeout_s=CALL_S)
    return caught.value


async def test_a_crash_while_working_ends_the_worker(service_path: Path) -> None:
    async with running(service_path, crash_at=1) as worker:
        assert "crashed while working" in str(await _error_of(worker, "hold"))


@pytest.mark.parametrize("method", ["spawn", "fork"])
async def test_a_killed_worker_takes_its_children_along_and_is_noticed(service_path: Path, method: str) -> None:
    async with running(service_path) as worker:
        child = await worker.call(method, timeout_s=CALL_S)
        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
            pending = group.create_task(_error_of(worker, "hold"))
            await worker.call("echo", 1, timeout_s=CALL_S)
            os.kill(worker.pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in str(pending.result())
        await until_gone(child)


async def test_closing_lets_the_service_close_and_is_idempotent(service_path: Path) -> None:
    closed = service_path / "closed"
    worker = await start(service_path, closed=str(closed))
    await worker.aclose()
    await worker.aclose()
    assert closed.exists()
    assert not is_alive(worker.pid)
    assert "ended with 0" in str(await _error_of(worker, "echo"))


async def test_a_worker_that_hangs_while_closing_is_killed(service_path: Path) -> None:
    worker = await start(service_path, hang_at_close=True)
    started = time.monotonic()
    await worker.aclose(timeout_s=0.2)
    assert time.monotonic() - started < SOON_S
    assert not is_alive(worker.pid)


async def test_a_cancelled_close_still_kills(service_path: Path) -> None:
    worker = await start(service_path, hang_at_close=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await worker.aclose(timeout_s=60)
    assert not is_alive(worker.pid)
    await worker.aclose()


async def test_closing_fails_calls_that_still_wait(service_path: Path) -> None:
    worker = await start(service_path)
    pending = asyncio.create_task(_error_of(worker, "hold"))
    await worker.call("echo", 1, timeout_s=CALL_S)
    await worker.aclose()
    assert isinstance(await pending, WorkerError)


async def test_the_child_sees_the_given_environment_and_no_working_directory_on_its_path(service_path: Path) -> None:
    worker = await WorkerProcess.start(
        "misbehaving:build",
        {},
        name="worker",
        log_path=service_path / "log",
        start_timeout_s=CALL_S,
        env={**paths_with(service_path), "GIVEN": "yes"},
    )
    async with worker:
        assert await worker.call("environ", "GIVEN", timeout_s=CALL_S) == "yes"
        assert await worker.call("path", timeout_s=CALL_S) == str(service_path)


async def test_a_worker_ignores_ctrl_c(service_path: Path) -> None:
    async with running(service_path) as worker:
        os.kill(worker.pid, signal.SIGINT)
        assert await worker.call("echo", 1, timeout_s=CALL_S) == 1


async def test_descriptors_above_1023_work(service_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"the limit of open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    sockets = [socket.socket() for _ in range(1100)]
    try:
        async with running(service_path) as worker:
            assert await worker.call("echo", 1, timeout_s=CALL_S) == 1
    finally:
        for one in sockets:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


PARENT = """
import asyncio, pathlib, sys
from palaestra.processes import WorkerProcess

async def main():
    folder = pathlib.Path(sys.argv[1])
    worker = await WorkerProcess.start(
        "misbehaving:build", {}, name="worker", log_path=folder / "log", start_timeout_s=20
    )
    print(worker.pid, flush=True)
    await worker.call("hold", timeout_s=600)

asyncio.run(main())
"""


def test_no_worker_outlives_a_killed_parent(service_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(service_path)],
        env={**os.environ, **paths_with(service_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    asyncio.run(until_gone(pid))


async def test_stacks_are_those_of_the_child(service_path: Path) -> None:
    async with await start(service_path) as worker:
        assert "most recent call first" in await worker.stacks()


async def test_stacks_of_a_log_that_was_removed_are_a_sentence(service_path: Path) -> None:
    async with await start(service_path) as worker:
        worker.log_path.unlink()
        told = await worker.stacks()
        assert told.startswith("the stacks of worker cannot be read: [Errno 2] No such file")
        assert await worker.call("echo", 1, timeout_s=CALL_S) == 1


async def test_stacks_of_a_child_that_ended_just_now_are_a_sentence(
    service_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError(3, "No such process")

    async with await start(service_path) as worker:
        with monkeypatch.context() as patch:
            patch.setattr("palaestra.processes.os.kill", gone)
            told = await worker.stacks()
    assert told == "the stacks of worker cannot be read: [Errno 3] No such process"
