"""The background loop: what `run` returns from has ended, interrupted or not, and a fork starts its own."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from palaestra.envs import _loop


def test_results_and_errors_come_back() -> None:
    async def divide(a: int, b: int) -> float:
        await asyncio.sleep(0)
        return a / b

    assert _loop.run(divide(1, 2)) == 0.5
    with pytest.raises(ZeroDivisionError):
        _loop.run(divide(1, 0))


def test_an_interrupt_returns_only_after_the_coroutine_has_cleaned_up() -> None:
    has_cleaned_up = threading.Event()

    async def wait_forever() -> None:
        try:
            await asyncio.sleep(0.1)  # the main thread must be waiting by then
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            has_cleaned_up.set()

    with pytest.raises(KeyboardInterrupt):
        _loop.run(wait_forever())
    assert has_cleaned_up.is_set()


def test_many_threads_use_one_loop() -> None:
    async def loop_id() -> int:
        return id(asyncio.get_running_loop())

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(_loop.run(loop_id()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_forked_child_starts_a_loop_of_its_own() -> None:
    async def answer() -> int:
        return 42

    assert _loop.run(answer()) == 42
    pid = os.fork()
    if pid == 0:
        os._exit(_loop.run(answer()))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 42
