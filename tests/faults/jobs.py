"""`palaestra train` as a user starts it, in small: begun, watched, hit, and its ledger read afterwards."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.faults.scene import SCENE, ScenePaths

FoundT = TypeVar("FoundT")

_REPOSITORY = Path(__file__).parents[2]
_PATIENCE_S = 120.0
_LOOK_S = 0.05
MODULE = "tests.faults.scene"

TRAIN: Mapping[str, Any] = {
    "engine": "transformers",
    "steps": 3,
    "group_size": 2,
    "groups_per_step": 2,
    "concurrency": 4,
    "save_every": 1,
    "sampling.max_tokens": 4,
    "engine_config.max_model_len": 256,
}
"""Small settings; a job's own come on top."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job in `folder`: its run folder is `folder/run`, its faults are called by files in `folder`."""

    folder: Path
    model: Path
    suite: Mapping[str, float] = field(default_factory=lambda: {SCENE: 1.0})
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def paths(self) -> ScenePaths:
        return ScenePaths(self.folder)

    def command(self, *more: str, **changes: Any) -> list[str]:
        """The command line, with `changes` of training keys written with `__` for a dot."""
        config = self.folder / "job.toml"
        suite = "".join(f"{json.dumps(name)} = {weight}\n" for name, weight in self.suite.items())
        options = "".join(
            f"[suite.options.{json.dumps(name)}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
            for name, values in self.options.items()
        )
        head = f'model = {json.dumps(str(self.model))}\n[suite]\nform = "compact"\n'
        config.write_text(f"{head}[suite.weights]\n{suite}{options}")
        values = {**TRAIN, **self.train, **{key.replace("__", "."): value for key, value in changes.items()}}
        assignments = [word for k, v in values.items() for word in ("--set", f"train.{k}={json.dumps(v)}")]
        program = str(Path(sys.executable).with_name("palaestra"))
        return [program, "train", str(config), "--run", str(self.run), "--import", MODULE, *assignments, *more]

    @contextmanager
    def start(self, *more: str, **changes: Any) -> Iterator[Running]:
        """The command as a child of this test, killed with its workers if it is still there at the end."""
        errors = self.folder / "errors.txt"
        with errors.open("w") as file, (self.folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                self.command(*more, **changes),
                stdout=output,
                stderr=file,
                cwd=_REPOSITORY,
                env={**os.environ, **self.environment, "PALAESTRA_FAULTS": str(self.folder)},
            )
        running = Running(job=self, process=process, errors_path=errors)
        try:
            yield running
        finally:
            family = running.family()
            if process.poll() is None:
                process.kill()
                process.wait()
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()

    def finish(self, *more: str, **changes: Any) -> Ended:
        """The command to its end."""
        with self.start(*more, **changes) as running:
            return running.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Exit code, and the lines of the error stream that are ours: no workers' and no gate's."""

    code: int
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A command under way."""

    job: Job
    process: subprocess.Popen[bytes]
    errors_path: Path

    def family(self) -> list[psutil.Process]:
        """All processes below it."""
        try:
            children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
            return children
        except psutil.NoSuchProcess:
            return []

    def find(self, *words: str) -> psutil.Process:
        """The process below it whose command line has all `words`; waits for it."""

        def look() -> psutil.Process | None:
            for member in self.family():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if all(word in " ".join(member.cmdline()) for word in words):
                        return member
            return None

        return self.until(look, f"a process with {words}")

    def until(self, look: Callable[[], FoundT | None], what: str, *, timeout_s: float = _PATIENCE_S) -> FoundT:
        """What `look` finds, asked again until it is not None or False; the command must live that long."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = look()
            if found:
                return found
            assert self.process.poll() is None, f"it ended before {what}: {self.errors()}"
            assert time.monotonic() < deadline_s, f"no {what}: {self.errors()}"
            time.sleep(_LOOK_S)

    def until_told(self, text: str, *, timeout_s: float = _PATIENCE_S) -> None:
        """Wait for a text on the error stream."""
        self.until(lambda: text in self.errors(), f"{text!r}", timeout_s=timeout_s)

    def until_step(self, step: int) -> None:
        """Wait until a step is in the ledger."""
        self.until(lambda: last_step(self.job.run) >= step, f"step {step}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def errors(self) -> str:
        return self.errors_path.read_text()

    def wait(self, *, timeout_s: float = _PATIENCE_S) -> Ended:
        """Wait for the end, and that no process of it is left."""
        family = self.family()
        code = self.process.wait(timeout=timeout_s)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert [process.name() for process in alive] == []
        assert weight_folders(self.process.pid) == []
        lines = [line for line in self.errors().splitlines() if not line.startswith("gate: ")]
        return Ended(code=code, lines=lines)


def weight_folders(pid: int) -> list[Path]:
    """Folders of weights of a run in shared memory."""
    return list(Path("/dev/shm").glob(f"palaestra-weights-{pid}-*"))


def last_step(run: Path) -> int:
    """The newest recorded step of a run that may be going on."""
    with suppress(sqlite3.Error):
        return int(query(run, "SELECT COALESCE(MAX(step), 0) FROM steps")[0][0])
    return 0


def query(run: Path, statement: str) -> list[tuple[Any, ...]]:
    """Ask a run's ledger, which is not changed by that."""
    with closing(sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        return list(connection.execute(statement))


def plays(run: Path) -> list[dict[str, Any]]:
    """The records of all ended episodes, in the order in which they ended."""
    return [json.loads(record) for (record,) in query(run, "SELECT record FROM plays ORDER BY rowid")]


def check_plays(run: Path) -> dict[str, int]:
    """Counts of outcomes, after a proof that no failure carries a number and no episode a failure of ours."""
    counts: dict[str, int] = {}
    for play in plays(run):
        outcome, is_numbered = play["outcome"], play["outcome"] in ("scored", "truncated")
        assert (play["reward"] is not None) == is_numbered, play
        assert (play["failure"] is None) or not is_numbered, play
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def check_whole(run: Path, *, steps: int, groups_per_step: int = 2) -> None:
    """Every step is there once with its groups, and every group is accounted for."""
    assert query(run, "SELECT step FROM steps ORDER BY step") == [(step + 1,) for step in range(steps)]
    trained = query(run, "SELECT COUNT(*) FROM groups WHERE state = 'trained'")[0][0]
    assert trained == steps * groups_per_step
    assert query(run, "SELECT COUNT(*) FROM groups")[0][0] == query(run, "SELECT MAX(number) + 1 FROM groups")[0][0]
    assert query(run, "SELECT COUNT(*) FROM plays JOIN groups USING (number) WHERE state = 'trained'")[0][0] > 0
