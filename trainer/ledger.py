"""The ledger: the durable record of every group a run issued, and what became of it.

SQLite in WAL mode, one writer thread, one process at a time. Invariant, checked whenever it is opened or asked
for: issued = trained + dropped(reason) + in hand. A group is written before it is played, its episodes before
they are trained, and the training of a step in one transaction with its metrics.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from palaestra.errors import ConfigError, LedgerError
from palaestra.records import episode_from_json, episode_to_json, trajectory_from_bytes, trajectory_to_bytes
from palaestra.types import Group, Task

ValueT = TypeVar("ValueT")

FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    number INTEGER PRIMARY KEY, task TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'finished', 'trained', 'dropped')),
    reason TEXT, step INTEGER, newest_version INTEGER);
CREATE TABLE IF NOT EXISTS episodes (
    number INTEGER NOT NULL REFERENCES groups, position INTEGER NOT NULL,
    record TEXT NOT NULL, trajectory BLOB, PRIMARY KEY (number, position));
CREATE TABLE IF NOT EXISTS steps (step INTEGER PRIMARY KEY, metrics TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Counts of groups. `issued = trained + dropped + in_hand` or the ledger is refused."""

    issued: int
    trained: int
    dropped: Mapping[str, int]
    in_hand: int


class Ledger:
    """Handle on a run's ledger. Open with `Ledger.open`, close with `aclose`."""

    def __init__(self, connection: sqlite3.Connection, lock: IO[str], thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._lock = lock
        self._thread = thread

    @classmethod
    async def open(cls, folder: Path, *, meta: Mapping[str, Any]) -> Ledger:
        """Open or create the ledger of a run folder.

        Raises `LedgerError` when another process holds it, when it is damaged, or when it was made by
        another format or with another `meta` (what must not change over a run's life).
        """
        try:
            lock = await asyncio.to_thread(_take_lock, folder)
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {folder}: {error.strerror}; choose another place"
            ) from error
        thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _connect, folder / "ledger.sqlite")
            ledger = cls(connection, lock, thread)
            await ledger._run(lambda: ledger._check_meta(meta))
            await ledger.balance()
        except BaseException:
            thread.shutdown()
            lock.close()
            raise
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

    async def issue(self, number: int, task: Task) -> None:
        """Record that a group is about to be played."""
        await self._write(
            "INSERT INTO groups VALUES (?, ?, 'issued', NULL, NULL, NULL)", (number, json.dumps(asdict(task)))
        )

    async def finish(self, number: int, group: Group) -> None:
        """Record a played group with all its episodes."""
        await self._run(lambda: self._finish(number, group))

    async def drop(self, number: int, reason: str) -> None:
        """Record that a group will not be trained, and why."""
        update = "UPDATE groups SET state = 'dropped', reason = ? WHERE number = ? AND state IN ('issued', 'finished')"
        if await self._write(update, (reason, number)) != 1:
            raise LedgerError(f"group {number} cannot be dropped: it is not in hand")

    async def train(self, numbers: Sequence[int], step: int, metrics: Mapping[str, Any]) -> None:
        """Record a learner step and the groups that made it, in one transaction."""
        await self._run(lambda: self._train(numbers, step, metrics))

    async def balance(self) -> Balance:
        """The counts; raises `LedgerError` when they do not add up."""
        return await self._run(self._balance)

    async def rewind(self, step: int) -> None:
        """Go back to the checkpoint of `step`.

        Steps after it are forgotten. Their groups, and unused groups with tokens of versions after it, are
        in hand again, to be played anew: the weights that sampled or trained on them are lost.
        """
        await self._run(lambda: self._rewind(step))

    async def unplayed(self) -> list[tuple[int, Task]]:
        """Issued groups without episodes, by number."""
        rows = await self._run(
            lambda: self._connection.execute(
                "SELECT number, task FROM groups WHERE state = 'issued' ORDER BY number"
            ).fetchall()
        )
        return [(number, Task(**json.loads(task))) for number, task in rows]

    async def finished(self) -> list[tuple[int, Group]]:
        """Played groups that are neither trained nor dropped, by number."""
        return await self._run(self._load_finished)

    async def next_number(self) -> int:
        """The first group number that was never issued."""
        rows = await self._run(
            lambda: self._connection.execute("SELECT COALESCE(MAX(number) + 1, 0) FROM groups").fetchall()
        )
        return int(rows[0][0])

    async def steps(self) -> list[dict[str, Any]]:
        """Metrics of all recorded steps, in order."""
        rows = await self._run(lambda: self._connection.execute("SELECT metrics FROM steps ORDER BY step").fetchall())
        return [json.loads(row[0]) for row in rows]

    async def records(self) -> list[dict[str, Any]]:
        """The JSON records of all played episodes, by group and position."""
        query = "SELECT record FROM episodes ORDER BY number, position"
        rows = await self._run(lambda: self._connection.execute(query).fetchall())
        return [json.loads(row[0]) for row in rows]

    async def _run(self, function: Callable[[], ValueT]) -> ValueT:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        except sqlite3.Error as error:
            raise LedgerError(
                f"the ledger cannot be read or written ({error}); free disk space, or restore it"
            ) from error

    async def _write(self, statement: str, values: Sequence[Any]) -> int:
        def run() -> int:
            with self._connection:
                return self._connection.execute(statement, values).rowcount

        return await self._run(run)

    def _finish(self, number: int, group: Group) -> None:
        rows = []
        newest = -1
        for position, episode in enumerate(group.episodes):
            trajectory = episode.trajectory
            if trajectory is not None and trajectory.num_sampled:
                newest = max(newest, int(trajectory.versions[trajectory.loss_mask].max()))
            blob = trajectory_to_bytes(trajectory) if trajectory is not None else None
            rows.append((number, position, json.dumps(episode_to_json(episode)), blob))
        with self._connection:
            update = "UPDATE groups SET state = 'finished', newest_version = ? WHERE number = ? AND state = 'issued'"
            if self._connection.execute(update, (newest, number)).rowcount != 1:
                raise LedgerError(f"group {number} finished twice, or was never issued")
            self._connection.executemany("INSERT INTO episodes VALUES (?, ?, ?, ?)", rows)

    def _train(self, numbers: Sequence[int], step: int, metrics: Mapping[str, Any]) -> None:
        update = "UPDATE groups SET state = 'trained', step = ? WHERE number = ? AND state = 'finished'"
        with self._connection:
            for number in numbers:
                if self._connection.execute(update, (step, number)).rowcount != 1:
                    raise LedgerError(f"group {number} cannot be trained: it is not finished and in hand")
            self._connection.execute("INSERT INTO steps VALUES (?, ?)", (step, json.dumps(metrics)))

    def _balance(self) -> Balance:
        rows = self._connection.execute("SELECT state, reason, COUNT(*) FROM groups GROUP BY state, reason").fetchall()
        counts: dict[str, int] = {}
        dropped: dict[str, int] = {}
        for state, reason, count in rows:
            counts[state] = counts.get(state, 0) + count
            if state == "dropped":
                dropped[reason] = count
        in_hand = counts.get("issued", 0) + counts.get("finished", 0)
        next_number = self._connection.execute("SELECT COALESCE(MAX(number) + 1, 0) FROM groups").fetchone()[0]
        trained = counts.get("trained", 0)
        if next_number != trained + sum(dropped.values()) + in_hand:
            raise LedgerError(
                f"the ledger does not add up: {next_number} issued, {trained} trained, {dropped} dropped, "
                f"{in_hand} in hand; restore it, or begin a new run folder"
            )
        return Balance(issued=next_number, trained=trained, dropped=dropped, in_hand=in_hand)

    def _rewind(self, step: int) -> None:
        lost = "state = 'trained' AND step > ? OR state = 'finished' AND newest_version > ?"
        with self._connection:
            self._connection.execute(
                f"DELETE FROM episodes WHERE number IN (SELECT number FROM groups WHERE {lost})", (step, step)
            )
            reissue = "UPDATE groups SET state = 'issued', step = NULL, newest_version = NULL WHERE "
            self._connection.execute(reissue + lost, (step, step))
            self._connection.execute("DELETE FROM steps WHERE step > ?", (step,))

    def _load_finished(self) -> list[tuple[int, Group]]:
        query = "SELECT number, task FROM groups WHERE state = 'finished' ORDER BY number"
        return [
            (number, self._load_group(number, Task(**json.loads(task))))
            for number, task in self._connection.execute(query).fetchall()
        ]

    def _load_group(self, number: int, task: Task) -> Group:
        query = "SELECT record, trajectory FROM episodes WHERE number = ? ORDER BY position"
        episodes = tuple(
            episode_from_json(json.loads(record), trajectory_from_bytes(blob) if blob is not None else None)
            for record, blob in self._connection.execute(query, (number,))
        )
        return Group(id=str(number), task=task, episodes=episodes)

    def _check_meta(self, meta: Mapping[str, Any]) -> None:
        wanted = {"format": FORMAT, **meta}
        recorded = {key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM meta")}
        if not recorded:
            with self._connection:
                rows = [(key, json.dumps(value)) for key, value in wanted.items()]
                self._connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            return
        for key, value in wanted.items():
            if recorded.get(key) != json.loads(json.dumps(value)):
                raise LedgerError(
                    f"this run was started with {key} = {recorded.get(key)!r}, not {value!r}; "
                    "use another run folder, or the settings it was started with"
                )


def _take_lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "an unknown process"
        lock.close()
        raise LedgerError(f"{folder} is in use by {owner}; wait for it, or choose another run folder") from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(_SCHEMA)
    except sqlite3.Error as error:
        raise LedgerError(
            f"cannot open {path}: {error}; the file is damaged or its disk is full or read-only"
        ) from error
    return connection
