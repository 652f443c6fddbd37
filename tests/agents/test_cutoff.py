"""A cutoff ends what runs in its scopes, once, by name, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from palaestra.agents._cutoff import CutError, Cutoff


async def wait_in(cutoff: Cutoff) -> None:
    async with cutoff.scope():
        await asyncio.Event().wait()


async def time_out_in(cutoff: Cutoff) -> None:
    async with cutoff.scope(), asyncio.timeout(0):
        await asyncio.Event().wait()


async def test_all_scopes_end_with_the_first_reason() -> None:
    cutoff = Cutoff()
    waits = [asyncio.create_task(wait_in(cutoff)) for _ in range(3)]
    await asyncio.sleep(0)
    cutoff.cut("enough")
    cutoff.cut("late")
    done, _ = await asyncio.wait(waits)
    assert [str(task.exception()) for task in done] == ["enough"] * 3
    assert {type(task.exception()) for task in done} == {CutError}
    assert cutoff.reason == "enough"


async def test_what_begins_after_the_cut_ends_at_its_first_wait() -> None:
    cutoff = Cutoff()
    cutoff.cut("enough")
    with pytest.raises(CutError, match="enough"):
        await wait_in(cutoff)


async def test_what_ended_before_the_cut_is_not_touched() -> None:
    cutoff = Cutoff()
    async with cutoff.scope():
        await asyncio.sleep(0)
    cutoff.cut("enough")
    await asyncio.sleep(0)


async def test_the_clock_counts_from_the_first_start() -> None:
    cutoff = Cutoff()
    cutoff.start(0.01, "late")
    cutoff.start(1000.0, "never")
    with pytest.raises(CutError, match="late"):
        await wait_in(cutoff)


async def test_a_closed_cutoff_cuts_no_more() -> None:
    cutoff = Cutoff()
    cutoff.start(0.0, "late")
    cutoff.close()
    async with cutoff.scope():
        for _ in range(3):
            await asyncio.sleep(0)
    assert cutoff.reason is None


async def test_a_timeout_inside_and_a_cancellation_from_outside_stay_themselves() -> None:
    cutoff = Cutoff()
    with pytest.raises(TimeoutError):
        await time_out_in(cutoff)
    waiting = asyncio.create_task(wait_in(cutoff))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert waiting.cancelled()
