"""The ledger's tables: what is written when, and how it is proved.

Plain functions on one SQLite connection; the ledger calls them on its writer thread. Invariants: a state changes only
along issued -> finished -> trained or dropped; whatever an episode left carries a checksum that is compared when it
is read.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palaestra.errors import LedgerError
from palaestra.records import episode_from_json, episode_to_json, trajectory_from_bytes, trajectory_to_bytes
from palaestra.types import Episode, Group, Task

FORMAT = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS configs (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    number INTEGER PRIMARY KEY, task TEXT NOT NULL, size INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'finished', 'trained', 'dropped')),
    reason TEXT, step INTEGER);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state, reason);
CREATE INDEX IF NOT EXISTS groups_by_step ON groups (step) WHERE step IS NOT NULL;
CREATE TABLE IF NOT EXISTS episodes (
    number INTEGER NOT NULL REFERENCES groups, position INTEGER NOT NULL, outcome TEXT,
    PRIMARY KEY (number, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS plays (
    number INTEGER NOT NULL, position INTEGER NOT NULL, record TEXT NOT NULL, trajectory BLOB,
    checksum INTEGER NOT NULL, UNIQUE (number, position));
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY, config INTEGER NOT NULL REFERENCES configs, groups TEXT NOT NULL,
    metrics TEXT NOT NULL, trace BLOB);
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, line TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenGroup:
    """An issued group that is not finished: its task, how many episodes it has, and those that ended, by position."""

    number: int
    task: Task
    size: int
    ended: Mapping[int, Episode]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """A learner step as it was made: its groups in the order trained, the configuration, what came out."""

    step: int
    groups: tuple[tuple[int, Group], ...]
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    trace: bytes | None


def connect(path: Path, on_open: Callable[[sqlite3.Connection], None] = lambda _: None) -> sqlite3.Connection:
    """Open or create the file and look it over; raises `LedgerError` when it is damaged or cannot be written.

    To look it over takes as long as to read it all: `on_open` hears of the connection before, to interrupt it.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            on_open(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _look_over(connection, path)
            recorded = meta(connection)
            if recorded and recorded.get("format") != FORMAT:
                raise LedgerError(
                    f"{path} was written in format {recorded.get('format')}, this version of Palaestra reads format "
                    f"{FORMAT}: go on with the version that wrote it, or choose another run folder"
                )
            with connection:
                connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as error:
        raise LedgerError(
            f"cannot open {path}: {error}; the file is damaged, or its disk is full or read-only: restore it, free "
            "space, or choose another run folder"
        ) from error
    return connection


def check_meta(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    """Note what a new run is; what an old one is stays."""
    if not meta(connection):
        rows = [(key, json.dumps(value)) for key, value in {"format": FORMAT, **values}.items()]
        with _writing(connection):
            connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)


def meta(connection: sqlite3.Connection) -> dict[str, Any]:
    """What the run is, as recorded when it began or by `amend_meta`; empty where no run began."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
        return {}
    return {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM meta")}


def amend_meta(connection: sqlite3.Connection, key: str, value: Any) -> None:
    """Record a change of what the run is, which its owner allowed."""
    with _writing(connection):
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))


def use_config(connection: sqlite3.Connection, config: Mapping[str, Any]) -> None:
    """Record the configuration of the steps to come, unless the last one is the same."""
    last = last_config(connection)
    if last is None or last[1] != json.loads(json.dumps(config)):
        with _writing(connection):
            values = (last_step(connection), json.dumps(config))
            connection.execute("INSERT INTO configs (step, value) VALUES (?, ?)", values)


def last_config(connection: sqlite3.Connection) -> tuple[int, dict[str, Any]] | None:
    """The newest configuration and its id."""
    row = connection.execute("SELECT id, value FROM configs ORDER BY id DESC LIMIT 1").fetchone()
    return None if row is None else (int(row[0]), json.loads(row[1]))


def note(connection: sqlite3.Connection, line: str) -> None:
    """Record something that happened to the run."""
    with _writing(connection):
        connection.execute("INSERT INTO events (step, line) VALUES (?, ?)", (last_step(connection), line))


def events(connection: sqlite3.Connection) -> list[tuple[int, str]]:
    """What happened to the run, each with the step after which."""
    return [(int(step), str(line)) for step, line in connection.execute("SELECT step, line FROM events ORDER BY id")]


def issue(connection: sqlite3.Connection, number: int, task: Task, size: int) -> None:
    """Record a group and all its episodes before they are dispatched."""
    with _writing(connection):
        values = (number, json.dumps(asdict(task)), size)
        connection.execute("INSERT INTO groups VALUES (?, ?, ?, 'issued', NULL, NULL)", values)
        rows = [(number, position) for position in range(size)]
        connection.executemany("INSERT INTO episodes VALUES (?, ?, NULL)", rows)


def end(connection: sqlite3.Connection, number: int, position: int, episode: Episode) -> None:
    """Record how an episode ended, with all it left."""
    record = json.dumps(episode_to_json(episode))
    blob = trajectory_to_bytes(episode.trajectory) if episode.trajectory is not None else None
    with _writing(connection):
        update = "UPDATE episodes SET outcome = ? WHERE number = ? AND position = ? AND outcome IS NULL"
        if connection.execute(update, (episode.outcome.value, number, position)).rowcount != 1:
            raise LedgerError(f"episode {number}.{position} ended twice, or was never issued")
        values = (number, position, record, blob, _checksum(record, blob))
        connection.execute("INSERT INTO plays VALUES (?, ?, ?, ?, ?)", values)


def finish(connection: sqlite3.Connection, number: int) -> None:
    """Record that all episodes of a group ended."""
    with _writing(connection):
        open_query = "SELECT COUNT(*) FROM episodes WHERE number = ? AND outcome IS NULL"
        num_open = connection.execute(open_query, (number,)).fetchone()[0]
        update = "UPDATE groups SET state = 'finished' WHERE number = ? AND state = 'issued'"
        if num_open or connection.execute(update, (number,)).rowcount != 1:
            raise LedgerError(f"group {number} cannot finish: {num_open} of its episodes run, or it is not in hand")


def drop(connection: sqlite3.Connection, number: int, reason: str) -> None:
    """Record that a group will not be trained; its episodes stay."""
    update = "UPDATE groups SET state = 'dropped', reason = ? WHERE number = ? AND state IN ('issued', 'finished')"
    with _writing(connection):
        if connection.execute(update, (reason, number)).rowcount != 1:
            raise LedgerError(f"group {number} cannot be dropped: it is not in hand")


def train(
    connection: sqlite3.Connection, numbers: Sequence[int], step: int, metrics: Mapping[str, Any], trace: bytes | None
) -> None:
    """Record a learner step and the groups that made it, in one transaction that is on the disk on return."""
    update = "UPDATE groups SET state = 'trained', step = ? WHERE number = ? AND state = 'finished'"
    config = last_config(connection)
    if config is None:
        raise LedgerError(f"step {step} has no configuration on record")
    with _writing(connection, is_synced=True):
        if step != last_step(connection) + 1:
            raise LedgerError(f"step {step} cannot follow step {last_step(connection)}")
        for number in numbers:
            if connection.execute(update, (step, number)).rowcount != 1:
                raise LedgerError(f"group {number} cannot be trained: it is not finished and in hand")
        values = (step, config[0], json.dumps(list(numbers)), json.dumps(metrics), trace)
        connection.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", values)


def amend(connection: sqlite3.Connection, step: int, metrics: Mapping[str, Any]) -> None:
    """Complete the metrics of a recorded step."""
    with _writing(connection):
        connection.execute("UPDATE steps SET metrics = ? WHERE step = ?", (json.dumps(metrics), step))


def last_step(connection: sqlite3.Connection) -> int:
    """The newest recorded step, 0 before the first."""
    return int(connection.execute("SELECT COALESCE(MAX(step), 0) FROM steps").fetchone()[0])


def next_number(connection: sqlite3.Connection) -> int:
    """The first group number that was never issued."""
    return int(connection.execute("SELECT COALESCE(MAX(number) + 1, 0) FROM groups").fetchone()[0])


def open_groups(connection: sqlite3.Connection) -> list[OpenGroup]:
    """Issued groups that are not finished, by number."""
    query = "SELECT number, task, size FROM groups WHERE state = 'issued' ORDER BY number"
    return [
        OpenGroup(number=number, task=Task(**json.loads(task)), size=size, ended=dict(_plays(connection, number)))
        for number, task, size in connection.execute(query).fetchall()
    ]


def finished(connection: sqlite3.Connection) -> list[tuple[int, Group]]:
    """Finished groups that are neither trained nor dropped, by number."""
    query = "SELECT number FROM groups WHERE state = 'finished' ORDER BY number"
    return [(number, load_group(connection, number)) for (number,) in connection.execute(query).fetchall()]


def load_group(connection: sqlite3.Connection, number: int) -> Group:
    """A group with all that its episodes left; raises `LedgerError` when a byte of it changed."""
    (task,) = connection.execute("SELECT task FROM groups WHERE number = ?", (number,)).fetchone()
    episodes = tuple(episode for _, episode in _plays(connection, number))
    return Group(id=str(number), task=Task(**json.loads(task)), episodes=episodes)


def load_step(connection: sqlite3.Connection, step: int) -> RecordedStep:
    """A recorded step with its groups; raises `LedgerError` when there is none."""
    query = (
        "SELECT steps.groups, configs.value, metrics, trace FROM steps JOIN configs ON configs.id = config "
        "WHERE steps.step = ?"
    )
    row = connection.execute(query, (step,)).fetchone()
    if row is None:
        raise LedgerError(f"no step {step} on record: the run has steps 1 to {last_step(connection)}")
    groups = tuple((number, load_group(connection, number)) for number in json.loads(row[0]))
    return RecordedStep(step=step, groups=groups, config=json.loads(row[1]), metrics=json.loads(row[2]), trace=row[3])


def config_of(connection: sqlite3.Connection, step: int) -> dict[str, Any]:
    """The configuration that made a step."""
    query = "SELECT value FROM steps JOIN configs ON configs.id = config WHERE steps.step = ?"
    value: dict[str, Any] = json.loads(connection.execute(query, (step,)).fetchone()[0])
    return value


def configs_of(connection: sqlite3.Connection, steps: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
    """Steps with the configurations that made them."""
    return [(step, config_of(connection, step)) for step in steps]


def step_metrics(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Metrics of all recorded steps, in order."""
    return [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM steps ORDER BY step")]


def last_metrics(connection: sqlite3.Connection) -> dict[str, Any]:
    """Metrics of the newest recorded step; empty before the first."""
    row = connection.execute("SELECT metrics FROM steps ORDER BY step DESC LIMIT 1").fetchone()
    found: dict[str, Any] = json.loads(row[0]) if row is not None else {}
    return found


def drops_told(connection: sqlite3.Connection) -> dict[str, int]:
    """How many dropped groups the recorded steps told of, by reason."""
    query = "SELECT key, SUM(each.value) FROM steps, json_each(metrics, '$.dropped') AS each GROUP BY key"
    return {str(reason): int(count) for reason, count in connection.execute(query)}


def records(
    connection: sqlite3.Connection, after: tuple[int, int], limit: int
) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """The JSON records of the next ended episodes beyond one, each with its group and position, in that order."""
    query = (
        "SELECT number, position, record FROM plays WHERE (number, position) > (?, ?) ORDER BY number, position LIMIT ?"
    )
    rows = connection.execute(query, (*after, limit)).fetchall()
    return [((int(number), int(position)), json.loads(record)) for number, position, record in rows]


def _plays(connection: sqlite3.Connection, number: int) -> Iterator[tuple[int, Episode]]:
    query = "SELECT position, record, trajectory, checksum FROM plays WHERE number = ? ORDER BY position"
    for position, record, blob, checksum in connection.execute(query, (number,)).fetchall():
        if _checksum(record, blob) != checksum:
            raise LedgerError(
                f"episode {number}.{position} in the ledger is damaged: its checksum differs; restore the file, or "
                "begin a new run folder"
            )
        trajectory = trajectory_from_bytes(blob) if blob is not None else None
        yield position, episode_from_json(json.loads(record), trajectory)


def _checksum(record: str, blob: bytes | None) -> int:
    return zlib.crc32(blob or b"", zlib.crc32(record.encode()))


def _look_over(connection: sqlite3.Connection, path: Path) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise LedgerError(
            f"{path} is damaged ({' '.join(str(found).split())}): restore it from a copy, or begin a new run folder; "
            "the checkpoints and the model beside it are not touched"
        )


class _writing:  # reads as a statement where it is used
    """One transaction. Without `is_synced` a loss of power may undo it, which leaves the episode to be played anew."""

    def __init__(self, connection: sqlite3.Connection, *, is_synced: bool = False) -> None:
        self._connection = connection
        self._is_synced = is_synced

    def __enter__(self) -> None:
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if self._is_synced else 'NORMAL'}")
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._connection.in_transaction:
            self._connection.execute("COMMIT" if kind is None else "ROLLBACK")
