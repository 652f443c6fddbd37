"""Stall reports: waits are named, tasks and loops are shown where they are, a report never ends a run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from palaestra.errors import WorkerError, leaves
from palaestra.trainer.stalls import Stalls, await_chain, describe_tasks


async def deepest(gate: asyncio.Event) -> None:
    await gate.wait()


async def stream(gate: asyncio.Event) -> AsyncIterator[int]:
    await deepest(gate)
    yield 1


async def middle(gate: asyncio.Event) -> None:
    async for _ in stream(gate):
        pass


def names(chain: list[str]) -> list[str]:
    return [place.rpartition(" ")[2] for place in chain]


async def test_a_chain_goes_from_the_task_down_to_where_it_waits() -> None:
    gate = asyncio.Event()
    waiting = asyncio.create_task(middle(gate))
    await asyncio.sleep(0)
    chain = await_chain(waiting)
    assert names(chain)[0] == "middle"
    assert names(chain)[-2:] == ["deepest", "Event.wait"]
    assert f"{__file__}:" in chain[0]
    gate.set()
    await waiting
    assert await_chain(waiting) == []


async def test_tasks_are_told_by_the_commonest_place_and_by_name() -> None:
    gate = asyncio.Event()
    waiting = [asyncio.create_task(deepest(gate), name=f"episode {count}") for count in range(3)]
    await asyncio.sleep(0)
    lines = describe_tasks()
    assert lines[0].startswith("3 wait in ")
    assert lines[0].endswith(" Event.wait")
    assert {"episode 0:", "episode 1:", "episode 2:"} <= set(lines)
    gate.set()
    await asyncio.wait(waiting)


async def test_tasks_of_one_name_are_all_told() -> None:
    gate = asyncio.Event()
    waiting = [asyncio.create_task(deepest(gate), name="episode") for _ in range(3)]
    await asyncio.sleep(0)
    assert describe_tasks()[0].startswith("3 wait in ")
    gate.set()
    await asyncio.wait(waiting)


class Elsewhere:
    """A process that never ends, and says where it is after a while."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.has_answered = asyncio.Event()
        self._delay_s = delay_s

    async def watch(self) -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async def stacks(self) -> str:
        await asyncio.sleep(self._delay_s)
        self.has_answered.set()
        return "the learner is elsewhere"


class Ended(Elsewhere):
    async def watch(self) -> NoReturn:
        raise WorkerError("the learner was killed by SIGKILL")


def make_stalls(folder: Path, told: list[str], *, report_s: float = 1000.0, process: Elsewhere | None = None) -> Stalls:
    processes = [process or Elsewhere()]
    return Stalls(folder=folder, report_s=report_s, facts=lambda: ["a fact"], processes=processes, say=told.append)


async def test_a_process_that_ends_while_nobody_calls_it_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with make_stalls(tmp_path, [], process=Ended()).watching():
            await asyncio.Event().wait()
    assert [str(error) for error in leaves(caught.value)] == ["the learner was killed by SIGKILL"]


async def test_a_wait_past_its_deadline_is_an_error_with_a_report(tmp_path: Path) -> None:
    stalls = make_stalls(tmp_path / "logs", [])
    with pytest.raises(WorkerError, match=r"a waits for b, and did so for 0\.01 s: a fact; stacks: .*stall-1"):
        async with stalls.wait("a waits for b", 0.01):
            await asyncio.Event().wait()
    text = (tmp_path / "logs" / "stall-1.txt").read_text()
    assert "a waits for b, for " in text
    assert "the learner is elsewhere" in text


async def test_facts_of_a_wait_are_told_with_it(tmp_path: Path) -> None:
    stalls = make_stalls(tmp_path, [])
    with pytest.raises(WorkerError, match=r"did so for 0\.01 s: 3 were dropped; a fact; stacks: "):
        async with stalls.wait("a waits for b", 0.01, facts=lambda: ["3 were dropped"]):
            await asyncio.Event().wait()
    assert " s\n3 were dropped\n\n# Parts\na fact" in (tmp_path / "stall-1.txt").read_text()


async def test_reports_of_an_earlier_life_stay(tmp_path: Path) -> None:
    for life in range(1, 3):
        stalls = make_stalls(tmp_path, [])
        async with stalls.wait(f"life {life} waits"):
            assert await stalls.report() == str(tmp_path / f"stall-{2 * life - 1}.txt")
            assert await stalls.report() == str(tmp_path / f"stall-{2 * life}.txt")
    texts = [(tmp_path / f"stall-{number}.txt").read_text() for number in range(1, 5)]
    assert ["life 1 waits" in text for text in texts] == [True, True, False, False]


async def test_a_report_may_show_a_name_that_is_no_text(tmp_path: Path) -> None:
    stalls = make_stalls(tmp_path, [])
    stalls.facts = lambda: ["a file called \udcff"]
    assert r"a file called \udcff" in Path(await stalls.report()).read_text()


async def test_a_report_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    was_told = asyncio.Event()

    def say(line: str) -> None:
        was_told.set()
        raise BrokenPipeError("nobody reads this")

    stalls = make_stalls(tmp_path, [], report_s=0.01)
    stalls.say = say
    async with stalls.watching():
        async with stalls.wait("a waits for b"):
            await was_told.wait()
        await asyncio.sleep(0)


async def test_a_timeout_of_another_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        async with make_stalls(tmp_path, []).wait("a waits for b", 60.0):
            raise TimeoutError


async def test_a_report_that_cannot_be_written_says_so_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stalls = make_stalls(tmp_path / "file" / "logs", [])
    with pytest.raises(WorkerError, match=r"a waits for b.*the report could not be written: Not a directory"):
        async with stalls.wait("a waits for b", 0.01):
            await asyncio.Event().wait()


@pytest.mark.parametrize("is_writable", [True, False])
async def test_a_loop_that_does_not_turn_is_told_with_its_stack(tmp_path: Path, is_writable: bool) -> None:
    folder = tmp_path / "logs"
    if not is_writable:
        folder.touch()
    told: list[str] = []
    was_told = threading.Event()
    stalls = make_stalls(folder, told, report_s=0.05)
    stalls.say = lambda line: (told.append(line), was_told.set())  # type: ignore[assignment, func-returns-value]
    async with stalls.watching():
        await asyncio.sleep(0)
        assert was_told.wait(10)  # the fault: it blocks the loop
    assert "the event loop has not turned for" in told[0]
    if is_writable:
        assert "test_a_loop_that_does_not_turn" in (folder / "stall-loop-1.txt").read_text()
    else:
        assert "could not be written" in told[0]


async def test_a_report_that_takes_its_time_is_no_loop_that_stands(tmp_path: Path) -> None:
    told: list[str] = []
    process = Elsewhere(0.5)
    stalls = make_stalls(tmp_path, told, report_s=0.1, process=process)
    async with stalls.watching(), stalls.wait("a waits for b"):
        await process.has_answered.wait()
    assert not any("has not turned" in line for line in told)
