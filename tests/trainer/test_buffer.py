"""The replay buffer: bounded lag, each group out exactly once, dropped groups told at once."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.trainer.buffer import Dropped, ReplayBuffer
from palaestra.types import Group
from tests.trainer.test_ledger import make_group


def no_objection(group: Group) -> None:
    return None


class Drops:
    def __init__(self) -> None:
        self.seen: list[Dropped] = []

    async def __call__(self, drop: Dropped) -> None:
        self.seen.append(drop)


@settings(max_examples=60)
@given(
    versions=st.lists(st.integers(0, 6), min_size=4, max_size=30),
    max_lag=st.integers(0, 3),
    version=st.integers(6, 8),
)
async def test_no_group_older_than_max_lag_is_handed_out(versions: list[int], max_lag: int, version: int) -> None:
    buffer = ReplayBuffer(max_lag=max_lag, objection=no_objection)
    drops = Drops()
    for number, sampled_at in enumerate(versions):
        await buffer.put(number, make_group(number, version=sampled_at))
    fresh = [number for number, sampled_at in enumerate(versions) if version - sampled_at <= max_lag]
    taken = await buffer.take(len(fresh), version, on_drop=drops)
    assert [number for number, _ in taken] == fresh
    assert {drop.number for drop in drops.seen} == set(range(len(versions))) - set(fresh)
    assert {drop.reason for drop in drops.seen} <= {"stale"}
    assert len(buffer) == 0


async def test_take_waits_for_enough_groups() -> None:
    buffer = ReplayBuffer(max_lag=1, objection=no_objection)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(buffer.take(2, 0, on_drop=Drops()))
        await buffer.put(7, make_group(7))
        await asyncio.sleep(0)
        assert not taking.done()
        await buffer.put(8, make_group(8))
    taken = taking.result()
    assert [number for number, _ in taken] == [7, 8]


async def test_drop_is_told_before_the_batch_is_full() -> None:
    buffer = ReplayBuffer(max_lag=0, objection=lambda group: "zero_variance" if group.id == "0" else None)
    drops = Drops()

    async def replace(drop: Dropped) -> None:
        await drops(drop)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(buffer.take(1, 0, on_drop=replace))
        await buffer.put(0, make_group(0))
        while not drops.seen:
            await asyncio.sleep(0)
        await buffer.put(1, make_group(1))
    assert drops.seen == [Dropped(0, "zero_variance")]
    taken = taking.result()
    assert taken[0][0] == 1
