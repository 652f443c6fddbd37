"""Shared parts: started once, closed once, newest first, whatever fails."""

from __future__ import annotations

import asyncio

import pytest

from palaestra.errors import SandboxError
from palaestra.resources import Resources


class Part:
    """Writes down when it is closed; may fail to close."""

    def __init__(self, name: str, log: list[str], *, fails: bool = False) -> None:
        self.name = name
        self.log = log
        self.fails = fails

    async def aclose(self) -> None:
        self.log.append(self.name)
        if self.fails:
            raise SandboxError(f"{self.name} does not close")


class Starter:
    """Starts parts called `name` 1, 2, ..., at a moment that the test chooses."""

    def __init__(self, name: str, log: list[str] | None = None, *, fails: bool = False) -> None:
        self.name = name
        self.log = [] if log is None else log
        self.fails = fails
        self.num_started = 0
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def __call__(self) -> Part:
        self.num_started += 1
        await self.may_go.wait()
        return Part(f"{self.name}{self.num_started}", self.log, fails=self.fails)


async def test_all_who_ask_at_once_share_one_start() -> None:
    start = Starter("a")
    async with Resources() as resources:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(resources.get("a", start)) for _ in range(8)]
        assert len({id(task.result()) for task in tasks}) == 1
        assert start.num_started == 1
    assert start.log == ["a1"]


async def test_a_slow_start_does_not_hold_up_other_parts() -> None:
    slow, quick = Starter("slow"), Starter("quick")
    slow.may_go.clear()
    async with Resources() as resources, asyncio.TaskGroup() as group:
        waiting = group.create_task(resources.get("slow", slow))
        await resources.get("quick", quick)
        assert not waiting.done()
        slow.may_go.set()


async def test_parts_close_newest_first_and_one_that_fails_keeps_none_open() -> None:
    log: list[str] = []
    resources = Resources()
    for name, fails in (("a", False), ("b", True), ("c", False)):
        await resources.get(name, Starter(name, log, fails=fails))
    with pytest.raises(SandboxError, match="b1 does not close"):
        await resources.aclose()
    assert log == ["c1", "b1", "a1"]
    await resources.aclose()
    assert log == ["c1", "b1", "a1"]


async def test_a_start_that_fails_is_tried_again_by_the_next_who_asks() -> None:
    async def broken() -> Part:
        raise SandboxError("no")

    start = Starter("a")
    async with Resources() as resources:
        with pytest.raises(SandboxError, match="no"):
            await resources.get("a", broken)
        assert (await resources.get("a", start)).name == "a1"


async def test_a_forgotten_part_is_started_anew_and_both_are_closed() -> None:
    start = Starter("a")
    async with Resources() as resources:
        first = await resources.get("a", start)
        resources.forget("a")
        assert await resources.get("a", start) is not first
        resources.forget("never started")
    assert start.log == ["a2", "a1"]


async def test_forgetting_a_dead_part_keeps_its_successor() -> None:
    start = Starter("a")
    async with Resources() as resources:
        first = await resources.get("a", start)
        resources.forget("a", first)
        second = await resources.get("a", start)
        resources.forget("a", first)
        assert await resources.get("a", start) is second


async def test_a_part_whose_start_ends_after_closing_is_closed_too() -> None:
    start = Starter("a")
    start.may_go.clear()
    resources = Resources()
    waiting = asyncio.ensure_future(resources.get("a", start))
    await asyncio.sleep(0)
    await resources.aclose()
    start.may_go.set()
    with pytest.raises(SandboxError, match="closed while 'a' started"):
        await waiting
    assert start.log == ["a1"]


async def test_nothing_is_started_after_closing() -> None:
    start = Starter("a")
    resources = Resources()
    await resources.aclose()
    with pytest.raises(SandboxError, match="after its resources were closed"):
        await resources.get("a", start)
    assert start.num_started == 0
