"""A cutoff calls off what is registered with it, once, by name, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from palaestra.agents._cutoff import Cutoff


def test_all_are_called_off_once_and_the_first_reason_counts() -> None:
    cutoff = Cutoff()
    called: list[int] = []
    with cutoff.calling(lambda: called.append(1)), cutoff.calling(lambda: called.append(2)):
        cutoff.cut("enough")
        cutoff.cut("late")
    assert called == [1, 2]
    assert cutoff.reason == "enough"


def test_what_begins_after_the_cut_is_called_off_at_once() -> None:
    cutoff = Cutoff()
    cutoff.cut("enough")
    called: list[int] = []
    with cutoff.calling(lambda: called.append(1)):
        assert called == [1]


def test_what_ended_before_the_cut_is_not_touched() -> None:
    cutoff = Cutoff()
    with cutoff.calling(lambda: pytest.fail("it had ended")):
        pass
    cutoff.cut("enough")


async def test_the_clock_counts_from_the_first_start() -> None:
    cutoff, called = Cutoff(), asyncio.Event()
    cutoff.start(0.01, "late")
    cutoff.start(1000.0, "never")
    with cutoff.calling(called.set):
        await called.wait()
    assert cutoff.reason == "late"


async def test_a_closed_cutoff_cuts_no_more() -> None:
    cutoff = Cutoff()
    cutoff.start(0.0, "late")
    cutoff.close()
    for _ in range(3):
        await asyncio.sleep(0)
    assert cutoff.reason is None
