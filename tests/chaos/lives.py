"""A run and its lives: starts one, kills it, sees that nothing of it is left, and tells how it went."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.errand import ERRAND
from tests.chaos.faults import kill
from tests.chaos.plan import Entry, Fault, Plan, Whom, read_journal

_MARK = "PALAESTRA_CHAOS"
_LIFE = Path(__file__).with_name("life.py")
_SHARED_MEMORY = Path("/dev/shm")
_DEATH_S = 20.0
_LOG_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """How a life went. `ready_s` is None where it ended before it trained; `complaints` are against the rules.

    `phase` is what it was at when it ended, `num_made_again` the recorded steps that it began to make again.
    """

    is_over: bool
    was_killed: bool
    wall_s: float
    ready_s: float | None
    phase: str
    num_made_again: int
    notes: tuple[str, ...]
    complaints: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Run:
    """A run that is killed and begun again. `folder` holds `run`, and beside it what the lives leave."""

    folder: Path
    model: Path
    config: Mapping[str, Any]
    suite: Mapping[str, float] = field(default_factory=lambda: {ERRAND: 1.0})
    allow: tuple[str, ...] = ()
    timeout_s: float = 300.0
    pids: list[int] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def ledger(self) -> Path:
        return self.run / "ledger.sqlite"

    def live(self, *, fault: Fault | None = None, after_s: float | None = None, whom: Whom = "driver") -> Life:
        """One life, killed by its fault or `after_s` seconds after it began, if it is not over before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / "journal.jsonl"
        num_before = sum(1 for _ in read_journal(journal))
        started_s = time.time()
        process = self._start(journal, fault)
        self.pids.append(process.pid)
        complaints = []
        try:
            process.wait(self.timeout_s if after_s is None else after_s)
        except subprocess.TimeoutExpired:
            kill(whom, process.pid)
            if after_s is None:
                complaints.append(f"it did not end within {self.timeout_s:g} s")
        code = process.wait()
        complaints += self._survivors()
        if code == 0:
            complaints += self._leftovers()
        if code not in (0, -9):
            complaints.append(f"it ended with {code}: {self._last_words()}")
        told = list(read_journal(journal))[num_before:]
        return Life(
            is_over=code == 0,
            was_killed=code == -9,
            wall_s=time.time() - started_s,
            ready_s=_ready_s(told, started_s),
            phase=_last_phase(told) or "starting",
            num_made_again=sum(entry.what == "phase" and entry.value == "resuming" for entry in told),
            notes=tuple(entry.value for entry in told if entry.what == "note"),
            complaints=tuple(complaints),
        )

    def _start(self, journal: Path, fault: Fault | None) -> subprocess.Popen[bytes]:
        plan = Plan(
            run=str(self.run),
            model=str(self.model),
            config=self.config,
            journal=str(journal),
            suite=self.suite,
            allow=self.allow,
            fault=fault,
        )
        plan.write(self.folder / "plan.json")
        with (self.folder / "life.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", str(_LIFE), str(self.folder / "plan.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, _MARK: str(self.folder)},
            )

    def _survivors(self) -> list[str]:
        """Workers that are alive long after their driver; they are ended here."""
        workers = [process for process in psutil.process_iter() if _is_marked(process, str(self.folder))]
        _, alive = psutil.wait_procs(workers, timeout=_DEATH_S)
        for process in alive:
            process.kill()
        return [f"process {process.pid} outlived its driver" for process in alive]

    def _leftovers(self) -> list[str]:
        """Published weights of lives that were killed; the last one should have swept them away."""
        found = [path for pid in self.pids for path in _SHARED_MEMORY.glob(f"palaestra-weights-{pid}-*")]
        return [f"{path.name} is left in shared memory" for path in found]

    def _last_words(self) -> str:
        lines = (self.folder / "life.log").read_text(errors="replace").splitlines()
        return " / ".join(line.strip() for line in lines[-_LOG_LINES:])


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.environ().get(_MARK) == mark)
    except (psutil.Error, OSError):
        return False


def _ready_s(told: list[Entry], started_s: float) -> float | None:
    ready = [entry.at_s for entry in told if entry.what == "phase" and entry.value == "playing"]
    return ready[0] - started_s if ready else None


def _last_phase(told: list[Entry]) -> str | None:
    return next((str(entry.value) for entry in reversed(told) if entry.what in ("phase", "back")), None)
