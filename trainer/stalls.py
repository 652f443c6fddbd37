"""Stall reports: who waits for whom, since when, and where each of them is in the code.

Invariant: no wait of the loop is silent, those after an error included. One that lasts longer than `report_s` writes a
report and says so once, one that passes its deadline ends the run with the same report; a loop that does not turn is
told by a thread. A report ends nothing: what cannot be read, written or told is left out of it by name.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

from palaestra.errors import WorkerError

_LOOK_S = 1.0
_SHOWN_STACKS = 12

_KINDS = (CoroutineType, AsyncGeneratorType, GeneratorType)
_Suspended: TypeAlias = "CoroutineType[Any, Any, Any] | AsyncGeneratorType[Any, Any] | GeneratorType[Any, Any, Any]"

Facts = Callable[[], Sequence[str]]
"""Lines on what the parts of a run are doing."""


@runtime_checkable
class ProcessPart(Protocol):
    """A part in a process of its own."""

    async def watch(self) -> NoReturn:
        """Wait for its end, and raise `WorkerError` by name."""

    async def stacks(self) -> str:
        """Where it is, thread by thread."""


@dataclass(slots=True)
class _Wait:
    text: str
    since_s: float
    facts: Facts
    is_told: bool = False


@dataclass(slots=True)
class Stalls:
    """Watches the waits of one run; reports go to `folder`, one line about each to `say`."""

    folder: Path
    report_s: float
    processes: Sequence[ProcessPart]
    say: Callable[[str], None]
    facts: Facts = tuple
    _waits: list[_Wait] = field(default_factory=list)

    @asynccontextmanager
    async def wait(self, text: str, timeout_s: float | None = None, *, facts: Facts = tuple) -> AsyncIterator[None]:
        """Name a wait, such as `the learner waits for rollouts`; past `timeout_s` it ends in a `WorkerError`.

        `facts` are those that belong to this wait.
        """
        wait = _Wait(text, time.monotonic(), facts)
        self._waits.append(wait)
        try:
            async with asyncio.timeout(timeout_s) as scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            where = await self.report()
            told = "; ".join((*facts(), *self.facts()))
            raise WorkerError(f"{text}, and did so for {timeout_s:g} s: {told}; stacks: {where}") from error
        finally:
            self._waits.remove(wait)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Look at the waits in here, to the end; a process that ends ends this by name, also while nobody calls it."""
        async with asyncio.TaskGroup() as looks:
            look = looks.create_task(self._look(), name="stall watch")
            try:
                # a group of their own: what is closed after a process ended may take long, and is watched too
                async with asyncio.TaskGroup() as tasks:
                    watches = [tasks.create_task(each.watch(), name="process watch") for each in self.processes]
                    try:
                        yield
                    finally:
                        for watch in watches:
                            watch.cancel()
            finally:
                look.cancel()

    def tell(self, line: str) -> None:
        """Say a line. It ends no run: whoever read the error stream may have left."""
        with suppress(OSError):
            self.say(line)

    async def _look(self) -> None:
        with _watch_loop(self.folder, self.report_s, self.tell):
            while True:
                await asyncio.sleep(_LOOK_S)
                for wait in tuple(self._waits):
                    waited_s = time.monotonic() - wait.since_s
                    if waited_s >= self.report_s and not wait.is_told:
                        wait.is_told = True
                        where = await self.report()
                        self.tell(f"{wait.text} for {waited_s:.0f} s by now; who is where: {where}")

    async def report(self) -> str:
        """Write who waits for whom, with the stacks of all tasks and processes; where that is, or why it is nowhere."""
        now_s = time.monotonic()
        lines = ["# Waits"]
        for wait in self._waits:
            lines += [f"{wait.text}, for {now_s - wait.since_s:.1f} s", *wait.facts()]
        lines += ["", "# Parts", *self.facts(), "", "# Tasks", *describe_tasks()]
        for process in self.processes:
            lines += ["", "# Process", await process.stacks()]
        return await asyncio.to_thread(_write, self.folder, "stall", "\n".join(lines) + "\n")


def describe_tasks() -> list[str]:
    """Where every task of the running loop waits: the commonest places first, then the whole chains of some."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    chains = [(task.get_name(), await_chain(task)) for task in tasks]
    places = Counter(chain[-1] for _, chain in chains if chain)
    lines = [f"{count} wait in {place}" for place, count in places.most_common()]
    for name, chain in chains[:_SHOWN_STACKS]:
        lines += ["", f"{name}:", *(f"  {place}" for place in chain)]
    return lines


def await_chain(task: asyncio.Task[Any]) -> list[str]:
    """The frames of a waiting task from the outermost to where it waits, which `Task.get_stack` does not give."""
    chain = []
    awaited = _suspended(task.get_coro())
    while awaited is not None:
        if isinstance(awaited, CoroutineType):
            frame, inner = awaited.cr_frame, awaited.cr_await
        elif isinstance(awaited, AsyncGeneratorType):
            frame, inner = awaited.ag_frame, awaited.ag_await
        else:
            frame, inner = awaited.gi_frame, awaited.gi_yieldfrom
        if frame is None:
            break
        chain.append(_describe(frame))
        awaited = _suspended(inner)
    return chain


def _suspended(awaited: Any) -> _Suspended | None:
    """What has a frame, behind what is awaited; None for a future or another thing without one."""
    if isinstance(awaited, _KINDS):
        return awaited
    # `async for` and `async with` await an object of the interpreter that names its generator to nobody else
    return next((each for each in gc.get_referents(awaited) if isinstance(each, _KINDS)), None)


def _describe(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}"


@contextmanager
def _watch_loop(folder: Path, report_s: float, tell: Callable[[str], None]) -> Iterator[None]:
    """A thread that reports when the loop does not turn for `report_s`: what blocks it is no task that waits."""
    loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()
    is_over, has_turned = threading.Event(), threading.Event()

    def watch() -> None:
        asked_s, is_told = time.monotonic(), False
        loop.call_soon_threadsafe(has_turned.set)
        while not is_over.wait(min(_LOOK_S, report_s / 4)):
            if has_turned.is_set():
                asked_s, is_told = time.monotonic(), False
                has_turned.clear()
                loop.call_soon_threadsafe(has_turned.set)
            silent_s = time.monotonic() - asked_s
            if silent_s >= report_s and not is_told:
                is_told = True
                where = _write(folder, "stall-loop", _stacks_of_threads(loop_thread))
                tell(f"the event loop has not turned for {silent_s:.0f} s: something in it blocks; stacks: {where}")

    thread = threading.Thread(target=watch, name="loop watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _stacks_of_threads(loop_thread: int) -> str:
    return "\n".join(
        f"# {'Loop' if ident == loop_thread else 'Thread'} {ident}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def _write(folder: Path, name: str, text: str) -> str:
    """The path of a new file. A disk that is full or read-only must not hide the stall that is to be told."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            number += 1
            path = folder / f"{name}-{number}.txt"
            # those before are of earlier lives of the run; a stack shows names of files, which may be no text
            with suppress(FileExistsError), path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                return str(path)
    except OSError as error:
        return f"nowhere, the report could not be written: {error.strerror}"
