"""One training run after another on one engine, each timed from its first rollout on.

Invariant: a run is kept when its `done.json` is there, written last; one that was interrupted is played again from its
beginning, since a timing that was broken off cannot be continued.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benchmarks._lag.plan import Run
from numpy.typing import NDArray

from palaestra.agents import Completion, Engine, EngineStats, Sampling
from palaestra.errors import PalaestraError
from palaestra.records import write_whole
from palaestra.resources import Resources
from palaestra.trainer import Trainer
from palaestra.trainer.metrics import StepRecord


class SharedEngine:
    """An engine that serves one run after another, each of which counts its versions from 0."""

    def __init__(self, engine: Engine, *, is_frozen: bool = False) -> None:
        """`is_frozen` keeps the weights, whatever is to be loaded."""
        self._engine = engine
        self._is_frozen = is_frozen
        self._first = 0
        self.max_model_len = engine.max_model_len

    def frozen(self) -> SharedEngine:
        """The same engine for runs that leave its weights as they are."""
        return SharedEngine(self._engine, is_frozen=True)

    async def begin(self) -> None:
        """From here on a new run counts."""
        self._first = (await self._engine.stats()).version + (0 if self._is_frozen else 1)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        """Sample; versions are the run's own."""
        found = await self._engine.generate(prompt, sampling, stop_ids=stop_ids, seed=seed)
        versions = found.versions - np.int32(self._first)
        return Completion(ids=found.ids, logprobs=found.logprobs, versions=versions, stop_reason=found.stop_reason)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probabilities."""
        return await self._engine.score(sequences)

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        """Load the run's version."""
        if not self._is_frozen:
            await self._engine.load_weights(folder, self._first + version, checksum)

    async def stats(self) -> EngineStats:
        """Running totals over all runs."""
        return await self._engine.stats()

    async def aclose(self) -> None:
        """Nothing: whoever opened the engine closes it."""


class Marks:
    """Wall seconds, CPU seconds of ours and of the whole machine at every update, counted from `begin`."""

    def __init__(self) -> None:
        self._wall_s = self._cpu_s = self._machine_s = 0.0
        self.found: list[dict[str, float]] = []

    async def begin(self, version: int) -> None:
        """The first rollout starts now."""
        self._wall_s, self._cpu_s, self._machine_s = time.monotonic(), cpu_seconds(), machine_seconds()

    def set(self, record: StepRecord) -> None:
        """An update is complete, its weights are published."""
        self.found.append(
            {
                "update": record.step,
                "wall_s": time.monotonic() - self._wall_s,
                "cpu_s": cpu_seconds() - self._cpu_s,
                "machine_s": machine_seconds() - self._machine_s,
            }
        )


def cpu_seconds() -> float:
    """Of this process and all that it started and that still run."""
    total = 0.0
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def machine_seconds() -> float:
    """CPU time of everything on this machine, since it started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def is_done(folder: Path) -> bool:
    """Whether a run is kept here."""
    return (folder / "done.json").is_file()


async def play(run: Run, start: Path, folder: Path, engine: SharedEngine, resources: Resources) -> None:
    """Play a run and keep it."""
    shutil.rmtree(folder, ignore_errors=True)
    marks = Marks()
    await engine.begin()
    trainer = Trainer(start, run.config(), run=folder, on_step=marks.set, on_note=lambda line: print(f"  {line}"))
    result = await trainer.afit(run.suite(), engine=engine, resources=resources, on_ready=marks.begin)
    if not result.is_complete:
        raise PalaestraError(f"stopped in {run.name}; the same command goes on with it")
    keep(folder, {"marks": marks.found, "steps": result.steps})


def keep(folder: Path, found: dict[str, Any]) -> None:
    """Say that a run is done, with what was found."""
    write_whole(folder / "done.json", json.dumps(found) + "\n")
