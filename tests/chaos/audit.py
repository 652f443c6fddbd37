"""What the ledger of a killed run must say, read from the file as any stranger would read it.

Each check gives a line for every breach. Nothing here uses the trainer's own counting, but for the balance, which is
proved both ways.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from palaestra.envs import EnvSuite
from palaestra.errors import LedgerError
from palaestra.records import trajectory_from_bytes
from palaestra.trainer import _ledger_store as store
from palaestra.trainer._ledger_proof import prove
from palaestra.types import Trajectory

_RANKS = {"issued": 0, "finished": 1, "trained": 2, "dropped": 2}


class GroupRow(NamedTuple):
    task: str
    size: int
    state: str
    reason: str | None
    step: int | None


class Play(NamedTuple):
    """An ended episode: when it was written, its record, its arrays, and a digest of both."""

    rowid: int
    record: str
    trajectory: bytes | None
    digest: str

    @property
    def tokens(self) -> Trajectory | None:
        return None if self.trajectory is None else trajectory_from_bytes(self.trajectory)


class StepRow(NamedTuple):
    config: int
    groups: tuple[int, ...]
    metrics: Mapping[str, Any]
    trace: bytes | None


@dataclass(slots=True)
class Snapshot:
    """Everything a ledger holds; empty where no ledger has begun."""

    groups: dict[int, GroupRow] = field(default_factory=dict)
    episodes: dict[tuple[int, int], str | None] = field(default_factory=dict)
    plays: dict[tuple[int, int], Play] = field(default_factory=dict)
    steps: dict[int, StepRow] = field(default_factory=dict)
    configs: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def num_open(self) -> int:
        """Episodes that are issued and have not ended."""
        return sum(outcome is None for outcome in self.episodes.values())


def take(ledger: Path) -> Snapshot:
    """Read a ledger, which nobody is writing."""
    snapshot = Snapshot()
    if not ledger.is_file():
        return snapshot
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, isolation_level=None)) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone() is None:
            return snapshot  # killed while the tables were made, the last of which this is
        _read(connection, snapshot)
        try:
            prove(connection)
            for number in snapshot.groups:
                store.load_group(connection, number)
        except LedgerError as error:
            snapshot.complaints.append(str(error))
    return snapshot


def _read(connection: sqlite3.Connection, snapshot: Snapshot) -> None:
    for number, *values in connection.execute("SELECT number, task, size, state, reason, step FROM groups"):
        snapshot.groups[number] = GroupRow(*values)
    for number, position, outcome in connection.execute("SELECT number, position, outcome FROM episodes"):
        snapshot.episodes[number, position] = outcome
    for rowid, number, position, record, blob in connection.execute(
        "SELECT rowid, number, position, record, trajectory FROM plays"
    ):
        digest = hashlib.sha256(record.encode() + b"\0" + (blob or b"")).hexdigest()
        if (number, position) in snapshot.plays:
            snapshot.complaints.append(f"episode {number}.{position} is there twice")
        snapshot.plays[number, position] = Play(rowid, record, blob, digest)
    for step, config, groups, metrics, trace in connection.execute("SELECT * FROM steps"):
        snapshot.steps[step] = StepRow(config, tuple(json.loads(groups)), json.loads(metrics), trace)
    snapshot.configs = [json.loads(value) for (value,) in connection.execute("SELECT value FROM configs ORDER BY id")]
    snapshot.events = [line for (line,) in connection.execute("SELECT line FROM events ORDER BY id")]


def check(snapshot: Snapshot, suite: EnvSuite, *, seed: int = 0) -> list[str]:
    """Breaches of what must hold at every moment."""
    return [
        *snapshot.complaints,
        *_check_groups(snapshot, suite, seed),
        *_check_episodes(snapshot),
        *_check_steps(snapshot),
        *_check_versions(snapshot),
    ]


def _check_groups(snapshot: Snapshot, suite: EnvSuite, seed: int) -> Iterator[str]:
    if sorted(snapshot.groups) != list(range(len(snapshot.groups))):
        yield f"the numbers {sorted(snapshot.groups)} have gaps: tasks were skipped"
    for number, group in snapshot.groups.items():
        if json.loads(group.task) != json.loads(json.dumps(asdict(suite.split("train").draw(number, seed=seed)))):
            yield f"group {number} plays another task than the sampler draws for it"
        if (group.state == "dropped") != (group.reason is not None):
            yield f"group {number} is {group.state} with the reason {group.reason}"
    counts = {state: sum(group.state == state for group in snapshot.groups.values()) for state in _RANKS}
    if sum(counts.values()) != len(snapshot.groups):
        yield f"{len(snapshot.groups)} groups issued, but {counts}"


def _check_episodes(snapshot: Snapshot) -> Iterator[str]:
    wanted = {(number, position) for number, group in snapshot.groups.items() for position in range(group.size)}
    if wanted != set(snapshot.episodes):
        yield f"episodes {sorted(wanted ^ set(snapshot.episodes))[:5]} are missing or belong to no group"
    ended = {key for key, outcome in snapshot.episodes.items() if outcome is not None}
    if ended != set(snapshot.plays):
        yield f"episodes {sorted(ended ^ set(snapshot.plays))[:5]} ended without a record, or the other way round"
    for (number, position), play in snapshot.plays.items():
        record = json.loads(play.record)
        if record["id"] != f"{number}.{position}" or record["outcome"] != snapshot.episodes.get((number, position)):
            yield f"episode {number}.{position} has the record of another one"


def _check_steps(snapshot: Snapshot) -> Iterator[str]:
    if sorted(snapshot.steps) != list(range(1, len(snapshot.steps) + 1)):
        yield f"the steps {sorted(snapshot.steps)} have gaps"
    trained: dict[int, int] = {}
    for step, row in sorted(snapshot.steps.items()):
        if row.metrics.get("step") != step or not 1 <= row.config <= len(snapshot.configs) or row.trace is None:
            yield f"step {step} has no metrics, configuration or trace of its own"
        for number in row.groups:
            if number in trained:
                yield f"group {number} was trained twice, in steps {trained[number]} and {step}"
            trained[number] = step
    recorded = {number: group.step for number, group in snapshot.groups.items() if group.state == "trained"}
    if trained != recorded:
        yield f"groups {sorted(trained.items() ^ recorded.items())[:5]} and steps disagree on what was trained"


def _check_versions(snapshot: Snapshot) -> Iterator[str]:
    oldest: dict[int, int] = {}
    for (number, position), play in snapshot.plays.items():
        tokens = play.tokens
        if tokens is None or not tokens.num_sampled:
            continue
        if (newest := int(tokens.versions.max())) > snapshot.last_step:
            yield f"episode {number}.{position} has a token of version {newest}, the last step is {snapshot.last_step}"
        if json.loads(play.record)["reward"] is not None:
            oldest[number] = min(oldest.get(number, newest), tokens.oldest_version)
    for step, row in snapshot.steps.items():
        config = snapshot.configs[row.config - 1]
        for number in row.groups:
            if oldest[number] < step - 1 - config["max_lag"]:
                yield f"step {step} trained group {number} with a token of version {oldest[number]}"


def check_kept(before: Snapshot, after: Snapshot) -> list[str]:
    """Breaches of what must not change from one life to the next."""
    return [*_check_kept_groups(before, after), *_check_kept_plays(before, after), *_check_kept_steps(before, after)]


def _check_kept_groups(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for number, was in before.groups.items():
        now = after.groups.get(number)
        if now is None or (now.task, now.size) != (was.task, was.size):
            yield f"group {number} is lost, or has another task or size"
        elif now != was and _RANKS[now.state] <= _RANKS[was.state]:
            yield f"group {number} went back from {was} to {now}"


def _check_kept_plays(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for (number, position), was in before.plays.items():
        now = after.plays.get((number, position))
        if now is None:
            yield f"episode {number}.{position} is lost"
        elif (now.rowid, now.digest) != (was.rowid, was.digest):
            yield f"episode {number}.{position} was played again, or its bytes changed"


def _check_kept_steps(before: Snapshot, after: Snapshot) -> Iterator[str]:
    if after.configs[: len(before.configs)] != before.configs or after.events[: len(before.events)] != before.events:
        yield "configurations or events were rewritten"
    for step, was in before.steps.items():
        now = after.steps.get(step)
        if now is None or (now.config, now.groups, now.trace) != (was.config, was.groups, was.trace):
            yield f"step {step} is lost or was rewritten"
        elif now.metrics != was.metrics:
            yield f"the metrics of step {step} were rewritten"
