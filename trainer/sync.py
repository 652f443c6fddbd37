"""Weight sync: carries each published version from the learner to the engine, and proves that it arrived.

Invariant: after `publish` returns, every new token is sampled from the learner's weights. The canary compares
log-probabilities of fixed sequences on both sides; when they differ, the run stops.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from palaestra.agents import Engine
from palaestra.errors import WorkerError
from palaestra.trainer.learner import Learner

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "palaestra-weights-"
_FIRST_CANARY = tuple(range(1, 33))
"""Ids that every vocabulary has; before the first step there is nothing better to compare on."""


class WeightSync:
    """Publishes through two alternating folders in shared memory; use as a context manager."""

    def __init__(self, learner: Learner, engine: Engine, *, tolerance: float, canary_every: int) -> None:
        self._learner = learner
        self._engine = engine
        self._tolerance = tolerance
        self._canary_every = canary_every
        self._num_published = 0
        self._canary: Sequence[Sequence[int]] = (_FIRST_CANARY,)
        self._folder: Path | None = None

    def __enter__(self) -> WeightSync:
        parent = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        _sweep(parent or Path(tempfile.gettempdir()))
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def set_canary(self, sequences: Sequence[Sequence[int]]) -> None:
        """Token sequences, each of at least two tokens, on which both sides must agree."""
        self._canary = sequences

    async def publish(self, version: int) -> float | None:
        """Hand version `version` to the engine; the canary's difference where it ran.

        Raises `WorkerError` when engine and learner disagree by more than the tolerance (nats).
        """
        if self._folder is None:
            raise RuntimeError("WeightSync must be entered before it publishes")
        folder = self._folder / f"slot{self._num_published % 2}"
        await self._learner.publish(folder)
        await self._engine.load_weights(folder, version)
        self._num_published += 1
        if self._canary and (self._num_published - 1) % self._canary_every == 0:
            return await self._check(version)
        return None

    async def _check(self, version: int) -> float:
        theirs = await self._engine.score(self._canary)
        ours = await self._learner.score(self._canary)
        difference = max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True))
        if not difference <= self._tolerance:
            raise WorkerError(
                f"weight sync failed: at version {version} engine and learner disagree by {difference:.3g} nats "
                f"(allowed {self._tolerance:g}); the engine does not hold the learner's weights"
            )
        return difference


def _sweep(parent: Path) -> None:
    """Remove what runs that were killed left behind."""
    for path in parent.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
