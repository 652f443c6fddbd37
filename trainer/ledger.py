"""The ledger: the durable record of every group and episode a run issued, and what became of it.

SQLite in WAL mode, one writer thread, one process at a time. Invariant, proved at every load and save: issued =
trained + dropped(reason) + in hand. A group and its episodes are written before they are dispatched, an episode as
soon as it ended, a step with its groups before its weights leave the learner.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from palaestra.errors import LedgerError
from palaestra.trainer import _ledger_store as store
from palaestra.trainer._ledger_proof import Balance, prove
from palaestra.trainer._ledger_reader import LedgerReader
from palaestra.trainer._ledger_store import FORMAT, OpenGroup, RecordedStep
from palaestra.trainer._run_lock import take_lock
from palaestra.types import Episode, Group, Task

__all__ = [
    "FORMAT",
    "Balance",
    "Ledger",
    "OpenGroup",
    "RecordedStep",
    "read_configs",
    "read_meta",
    "read_records",
    "read_step",
    "reading",
]

ValueT = TypeVar("ValueT")
ArgumentsT = ParamSpec("ArgumentsT")

_FILE = "ledger.sqlite"
_BEFORE_ALL = (-1, -1)
_NUM_AT_ONCE = 64
"""Episodes that a reader holds in memory."""
_LONG_S = 5.0
_INTERRUPT_AGAIN_S = 0.02


class Ledger:
    """Handle on a run's ledger. Open with `Ledger.open`, close with `aclose`."""

    def __init__(self, connection: sqlite3.Connection, lock: IO[str], thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._lock = lock
        self._thread = thread

    @classmethod
    async def open(
        cls, folder: Path, *, meta: Mapping[str, Any], tell: Callable[[str], None] = lambda _: None
    ) -> Ledger:
        """Open or create the ledger of a run folder; `meta` is what a new run is, and is ignored for an old one.

        Every byte is checked: `tell` hears a line where that takes long, and a cancellation breaks it off. Raises
        `LedgerError` when another process holds it, when it is damaged or does not add up, or when it was written in
        another format; `ConfigError` when the folder cannot be written.
        """
        lock = await asyncio.to_thread(take_lock, folder)
        thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        opened: list[sqlite3.Connection] = []
        opening = thread.submit(store.connect, folder / _FILE, opened.append)
        loop = asyncio.get_running_loop()
        telling = loop.call_later(_LONG_S, lambda: tell(f"checking the ledger, {_describe_size(folder / _FILE)}"))
        try:
            ledger = cls(await asyncio.wrap_future(opening), lock, thread)
            await ledger._do(store.check_meta, {"run": uuid.uuid4().hex, **meta})
            await ledger.balance()
        except BaseException:
            _call_off(thread.submit(_close, opening), opened)
            thread.shutdown()
            lock.close()
            raise
        finally:
            telling.cancel()
        return ledger

    async def aclose(self) -> None:
        """Close the file and let go of the run; idempotent."""
        if self._lock.closed:
            return
        try:
            await self._run(self._connection.close)
        finally:
            self._thread.shutdown()
            self._lock.close()

    async def meta(self) -> dict[str, Any]:
        """What the run is: its id under `run`, and what `open` was given when it began."""
        return await self._do(store.meta)

    async def amend_meta(self, key: str, value: Any) -> None:
        """Record a change of what the run is."""
        await self._do(store.amend_meta, key, value)

    async def use_config(self, config: Mapping[str, Any]) -> None:
        """Record the configuration of the steps to come."""
        await self._do(store.use_config, config)

    async def last_config(self) -> dict[str, Any] | None:
        """The configuration that was used last; None for a new run."""
        found = await self._do(store.last_config)
        return None if found is None else found[1]

    async def note(self, line: str) -> None:
        """Record something that happened to the run, in one line."""
        await self._do(store.note, line)

    async def events(self) -> list[tuple[int, str]]:
        """What happened to the run, each with the step after which."""
        return await self._do(store.events)

    async def issue(self, number: int, task: Task, size: int) -> None:
        """Record a group and its `size` episodes; they may be dispatched once this returned."""
        await self._do(store.issue, number, task, size)

    async def end(self, number: int, position: int, episode: Episode) -> None:
        """Record how an episode ended, with its tokens."""
        await self._do(store.end, number, position, episode)

    async def finish(self, number: int) -> None:
        """Record that all episodes of a group ended."""
        await self._do(store.finish, number)

    async def drop(self, number: int, reason: str) -> None:
        """Record that a group will not be trained, and why."""
        await self._do(store.drop, number, reason)

    async def train(
        self, numbers: Sequence[int], step: int, metrics: Mapping[str, Any], trace: bytes | None = None
    ) -> None:
        """Record a learner step and its groups in the order trained; once this returned, no loss of power undoes it."""
        await self._do(store.train, numbers, step, metrics, trace)

    async def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Complete the metrics of a step, with what came after it was recorded."""
        await self._do(store.amend, step, metrics)

    async def balance(self) -> Balance:
        """The counts; raises `LedgerError` when they do not add up."""
        return await self._do(prove)

    async def last_step(self) -> int:
        """The newest recorded step, 0 before the first."""
        return await self._do(store.last_step)

    async def load_step(self, step: int) -> RecordedStep:
        """A step as it was made, with its groups."""
        return await self._do(store.load_step, step)

    async def config_of(self, step: int) -> dict[str, Any]:
        """The configuration that made a step."""
        return await self._do(store.config_of, step)

    async def open_groups(self) -> list[OpenGroup]:
        """Issued groups that are not finished, with the episodes that ended, by number."""
        return await self._do(store.open_groups)

    async def finished(self) -> list[tuple[int, Group]]:
        """Finished groups that are neither trained nor dropped, by number."""
        return await self._do(store.finished)

    async def next_number(self) -> int:
        """The first group number that was never issued."""
        return await self._do(store.next_number)

    async def steps(self) -> list[dict[str, Any]]:
        """Metrics of all recorded steps, in order."""
        return await self._do(store.step_metrics)

    async def last_metrics(self) -> dict[str, Any]:
        """Metrics of the newest recorded step; empty before the first."""
        return await self._do(store.last_metrics)

    async def drops_told(self) -> dict[str, int]:
        """How many dropped groups the recorded steps told of, by reason."""
        return await self._do(store.drops_told)

    async def _do(
        self,
        function: Callable[Concatenate[sqlite3.Connection, ArgumentsT], ValueT],
        *args: ArgumentsT.args,
        **kwargs: ArgumentsT.kwargs,
    ) -> ValueT:
        return await self._run(partial(function, self._connection, *args, **kwargs))

    async def _run(self, function: Callable[[], ValueT]) -> ValueT:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise LedgerError(
                f"the ledger cannot be read or written ({error}); free disk space, make its folder writable, or "
                "restore it, and run the same command again"
            ) from error


def _close(opening: Future[sqlite3.Connection]) -> None:
    """Close what was opened, if it was; on the ledger's thread, to which the connection belongs."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def reading(run: Path) -> LedgerReader:
    """A reader of a run's ledger, for commands that look more than once; the run may be going on."""
    return LedgerReader(run / _FILE)


def _call_off(closing: Future[None], opened: Sequence[sqlite3.Connection]) -> None:
    """Break off what the ledger's thread has to do before `closing`, and wait for that.

    An interrupt ends the query under way, and does nothing between two of them: hence again and again.
    """
    while not wait((closing,), _INTERRUPT_AGAIN_S).done:
        for connection in opened:
            with suppress(sqlite3.ProgrammingError):  # closed just now
                connection.interrupt()


def _describe_size(path: Path) -> str:
    try:
        return f"{path.stat().st_size / 1e9:.1f} GB"
    except OSError:  # moved away meanwhile, which whoever reads it will tell
        return "size unknown"


def read_records(run: Path) -> Iterator[dict[str, Any]]:
    """The JSON records of all ended episodes of a run, some at a time; the run may be going on."""
    last = _BEFORE_ALL
    with reading(run) as reader:
        while found := reader.ask(store.records, last, _NUM_AT_ONCE):
            last = found[-1][0]
            yield from (record for _, record in found)


def read_meta(run: Path) -> dict[str, Any]:
    """What a run is; see `Ledger.meta`. The run may be going on."""
    with reading(run) as reader:
        return reader.ask(store.meta)


def read_configs(run: Path, steps: Iterable[int]) -> list[tuple[int, dict[str, Any]]]:
    """The configurations that made steps of a run, which may be going on."""
    with reading(run) as reader:
        return reader.ask(store.configs_of, list(steps))


def read_step(run: Path, step: int) -> RecordedStep:
    """A step of a run, which may be going on; raises `LedgerError` when there is no such step or it is damaged."""
    with reading(run) as reader:
        return reader.ask(store.load_step, step)
