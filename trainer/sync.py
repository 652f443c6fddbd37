"""Weight sync: carries each published version from the learner to the engine, and proves that it arrived.

Invariant: after `publish` returns, every new token is sampled from the learner's weights. Versions rise by the
learner's count, the engine refuses bytes with another checksum, requests share cached prefixes only within a version
(each engine's business), and the canary compares log-probabilities of the same sequences on both sides: when they
differ, or when the engine is nearer to the weights before, the run stops.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from palaestra.agents import Engine
from palaestra.errors import WorkerError
from palaestra.trainer.learner import Learner

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "palaestra-weights-"
_FIRST_CANARY = tuple(range(1, 33))
"""Ids that every vocabulary has; before the first step there is nothing better to compare on."""
_WORST = 10.0
"""A single token may differ by so many times the tolerance: in bfloat16 an unlikely one does by 0.1 and more."""
_CLEAR = 4.0
"""A step moved the weights visibly when log-probs moved so many times as far as the sides disagree on equal ones."""

Scores = list[NDArray[np.float32]]


class WeightSync:
    """Publishes through two alternating folders in shared memory; use as a context manager."""

    def __init__(self, learner: Learner, engine: Engine, *, tolerance: float, canary_every: int) -> None:
        self._learner = learner
        self._engine = engine
        self._tolerance = tolerance
        self._canary_every = canary_every
        self._num_published = 0
        self._canary: Sequence[Sequence[int]] = (_FIRST_CANARY,)
        self._before: Scores | None = None
        self._noise: float | None = None
        self._folder: Path | None = None

    def __enter__(self) -> WeightSync:
        parent = publish_place()
        _sweep(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    async def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        """Before a step: choose what both sides are compared on after it, and remember what the old weights say."""
        self._canary = sequences
        self._before = await self._learner.score(sequences) if sequences and self._is_due else None

    async def publish(self, version: int) -> float | None:
        """Hand version `version` to the engine; the canary's largest difference, in nats, where it ran.

        Raises `WorkerError` when the learner is at another version, when engine and learner disagree by more than the
        tolerance, or when the engine agrees better with the weights before the step.
        """
        if self._folder is None:
            raise RuntimeError("WeightSync must be entered before it publishes")
        folder = self._folder / f"slot{self._num_published % 2}"
        published = await self._learner.publish(folder)
        if published.version != version:
            raise WorkerError(f"weight sync failed: the learner published version {published.version}, not {version}")
        await self._engine.load_weights(folder, version, published.checksum or None)
        is_due = self._is_due
        self._num_published += 1
        return await self._check(version) if self._canary and is_due else None

    @property
    def _is_due(self) -> bool:
        return self._num_published % self._canary_every == 0

    async def _check(self, version: int) -> float:
        theirs = await self._engine.score(self._canary)
        ours = await self._learner.score(self._canary)
        difference = max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True))
        mean = _distance(theirs, ours)
        if not strain(mean, difference, self._tolerance) <= 1.0:
            raise WorkerError(
                f"weight sync failed: at version {version} engine and learner disagree by {mean:.3g} nats on average "
                f"and {difference:.3g} at most (allowed {self._tolerance:g} and {_WORST * self._tolerance:g}); the "
                "engine does not hold the learner's weights, or computes too coarsely: see engine_config.dtype"
            )
        self._check_is_new(version, theirs, ours)
        return difference

    def _check_is_new(self, version: int, theirs: Scores, ours: Scores) -> None:
        """Refuse an engine that still samples from the weights before, where the step moved them visibly.

        A small step stays within any tolerance; but then a stale engine agrees with the old weights, not the new ones.
        """
        disagreement = _distance(theirs, ours)
        before, self._before = self._before, None
        if self._noise is None or before is None:
            self._noise = disagreement
            return
        moved, from_old = _distance(ours, before), _distance(theirs, before)
        if moved > _CLEAR * self._noise and from_old < disagreement:
            raise WorkerError(
                f"weight sync failed: at version {version} the engine still holds the weights of the version before: "
                f"it is {from_old:.3g} nats from those, and {disagreement:.3g} from the published ones"
            )
        self._noise = max(self._noise, disagreement)


def publish_place() -> Path:
    """The folder below which weights are published: shared memory, or where there is none, the temporary folder."""
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def strain(mean: float, largest: float, tolerance: float) -> float:
    """How much of the tolerance two sides use up that differ by so many nats on average and at most; 1 just passes."""
    return float(np.maximum(mean, largest / _WORST) / tolerance)


def _distance(left: Scores, right: Scores) -> float:
    """Mean absolute difference over all tokens, in nats."""
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def _sweep(parent: Path) -> None:
    """Remove what runs that were killed left behind."""
    for path in parent.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
