"""What signals mean while a run trains: once asks, twice leaves, and leaving happens once."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys

import pytest

from palaestra.trainer._interrupts import Interrupts, interrupts


class _NobodyReads(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads this")


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def test_the_first_signal_asks_and_the_second_leaves_once() -> None:
    asked: list[str] = []
    owner = asyncio.create_task(wait_for_ever())
    taken = Interrupts(owner)
    with taken.finishing(lambda: asked.append("stop")):
        taken.on_signal()
        assert (asked, owner.cancelling()) == (["stop"], 0)
        taken.on_signal()
        taken.on_signal()
    assert (asked, owner.cancelling()) == (["stop"], 1)
    await asyncio.wait((owner,))


async def test_an_error_stream_that_nobody_reads_hinders_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    taken = Interrupts(None)
    monkeypatch.setattr(sys, "stderr", _NobodyReads())
    with taken.finishing(lambda: asked.append("stop")):
        taken.on_signal()
    assert asked == ["stop"]


async def test_a_closed_terminal_asks_too_unless_it_is_ignored() -> None:
    former = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        asked = asyncio.Event()
        with interrupts() as taken, taken.finishing(asked.set):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.wait_for(asked.wait(), 60)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
