"""Weight sync: carries each published version from the learner to the engine, and proves that it arrived.

Invariant: after `publish` returns, every new token is sampled from the learner's weights. Versions rise by the
learner's count, the engine refuses bytes with another checksum, requests share cached prefixes only within a version
(each engine's business), and the canary compares log-probabilities of the same sequences on both sides: when they
differ, when the engine is nearer to the weights before, or when the engine's own do not move with the weights, the run
stops. The learner's step does not wait for the engine: what the old weights say is awaited before new ones are loaded.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from palaestra.agents import Engine
from palaestra.errors import WorkerError, ungrouped
from palaestra.trainer._following import Following
from palaestra.trainer._weight_changes import Changes, find_changes
from palaestra.trainer.learner import Learner

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "palaestra-weights-"
_FIRST_CANARY = tuple(range(1, 33))
"""Ids that every vocabulary has; before the first step there is nothing better to compare on."""
_WORST = 10.0
"""A single token may differ by so many times the tolerance: in bfloat16 an unlikely one does by 0.1 and more."""
_CLEAR = 4.0
"""A step moved the weights visibly when log-probs moved so many times as far as the sides disagree on equal ones."""
_REMEMBERED = 16
"""How far the sides disagree on equal weights is told by so many canaries; what one of bad luck says is forgotten."""
_KEPT = 0.75
"""An engine of bfloat16 should follow a step, of which so much is left in its weights."""
_FINEST = 1e-6
"""No engine is taken to compute finer than this, in nats."""
_MANY_SCORES, _MANY_WEIGHTS = 20.0, 1000
"""No chance leaves all of an engine's scores as they were where so many should have moved, with so many of its weights:
about exp(-20). Either alone could, in a step that is too small for its rounding, or seen by the learner alone."""

Scores = list[NDArray[np.float32]]


class _Unmoved(NamedTuple):
    """What should have moved since the engine's scores last did: scores, as is expected of it, and weights it got.

    Weights are counted once the scores suffice, not before: fewer than did move, which makes the check no less sure.
    """

    num_scores: float = 0.0
    num_weights: int = 0


class _Before(NamedTuple):
    """What both sides said of the canary under the weights before a step."""

    ours: Scores
    theirs: Scores


class WeightSync:
    """Publishes through two alternating folders in shared memory; use as an asynchronous context manager."""

    _scoring: asyncio.Task[Scores] | None = None
    """What the engine says before a step; awaited by `publish`, or called off by the next `prepare` or on leaving."""

    def __init__(self, learner: Learner, engine: Engine, *, tolerance: float, canary_every: int) -> None:
        self._learner = learner
        self._engine = engine
        self._tolerance = tolerance
        self._canary_every = canary_every
        self._num_published = 0
        self._canary: Sequence[Sequence[int]] = (_FIRST_CANARY,)
        self._ours: Scores = []
        self._following = Following()
        self._disagreements: deque[float] = deque(maxlen=_REMEMBERED)
        self._checksum = ""
        self._unmoved = _Unmoved()
        self._folder: Path | None = None

    async def __aenter__(self) -> WeightSync:
        parent = publish_place()
        _sweep(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._leave_scoring(error)
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)  # an error here would hide why the run ends
                self._folder = None

    async def prepare(self, sequences: Sequence[Sequence[int]]) -> None:
        """Before a step: choose what both sides are compared on after it, and remember what the old weights say.

        The engine, which may have others to serve first, is asked and not waited for: it keeps its weights until
        `publish`, which raises what went wrong meanwhile. A step that was refused is followed by another `prepare`.
        """
        await self._leave_scoring()
        self._canary = sequences
        if sequences and self._is_due:
            self._scoring = asyncio.create_task(self._engine.score(sequences), name="the engine scores the canary")
            self._ours = await self._learner.score(sequences)

    def describe(self) -> list[str]:
        """What is under way, for a report on who waits for what."""
        is_scoring = self._scoring is not None and not self._scoring.done()
        return ["the engine has not yet scored the canary with the weights before the step"] if is_scoring else []

    async def publish(self, version: int) -> float | None:
        """Hand version `version` to the engine; the canary's largest difference, in nats, where it ran.

        Raises `WorkerError` when the learner is at another version, when engine and learner disagree by more than the
        tolerance, or when the engine still computes with the weights before the step.
        """
        if self._folder is None:
            raise RuntimeError("WeightSync must be entered before it publishes")
        folder = self._folder / f"slot{self._num_published % 2}"
        published = await self._learner.publish(folder)
        if published.version != version:
            raise WorkerError(f"weight sync failed: the learner published version {published.version}, not {version}")
        before = await self._take_before()
        await self._engine.load_weights(folder, version, published.checksum or None)
        is_due, is_other = self._is_due, published.checksum != self._checksum
        self._checksum = published.checksum
        self._num_published += 1
        return await self._check(version, before, is_other=is_other) if self._canary and is_due else None

    @property
    def _is_due(self) -> bool:
        return self._num_published % self._canary_every == 0

    async def _score(self, sequences: Sequence[Sequence[int]]) -> tuple[Scores, Scores]:
        """What engine and learner, at work at the same time, say of the sequences."""
        with ungrouped():
            async with asyncio.TaskGroup() as tasks:
                theirs = tasks.create_task(self._engine.score(sequences))
                ours = tasks.create_task(self._learner.score(sequences))
        return theirs.result(), ours.result()

    async def _take_before(self) -> _Before | None:
        """What both sides said before the step, once the engine has; what failed there is raised here."""
        if self._scoring is None:
            return None
        try:
            return _Before(self._ours, await self._scoring)
        finally:
            self._scoring = None

    async def _leave_scoring(self, error: BaseException | None = None) -> None:
        """End the engine's work on the canary; what failed there is raised, or told by the `error` under way."""
        if self._scoring is None:
            return
        scoring, self._scoring = self._scoring, None
        scoring.cancel()
        await asyncio.wait((scoring,))
        failure = None if scoring.cancelled() else scoring.exception()
        if failure is not None and error is not None:
            error.add_note(f"the engine failed to score the canary, too: {failure}")
        elif failure is not None:
            raise failure

    async def _check(self, version: int, before: _Before | None, *, is_other: bool) -> float:
        theirs, ours = await self._score(self._canary)
        difference = max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True))
        mean = _distance(theirs, ours)
        if not strain(mean, difference, self._tolerance) <= 1.0:
            raise WorkerError(
                f"weight sync failed: at version {version} engine and learner disagree by {mean:.3g} nats on average "
                f"and {difference:.3g} at most (allowed {self._tolerance:g} and {_WORST * self._tolerance:g}); the "
                "engine does not hold the learner's weights, or computes too coarsely: see engine_config.dtype"
            )
        if before is not None and self._disagreements:
            self._check_is_nearer(version, theirs, ours, before)
            await self._check_follows(version, theirs, ours, before)
            if all(map(np.array_equal, theirs, before.theirs)):
                if is_other:
                    await self._count_unmoved(version, ours, before)
                return difference  # it may not be that of equal weights
        self._unmoved = _Unmoved()
        if before is None or not self._disagreements or _distance(theirs, before.ours) >= mean:
            self._disagreements.append(mean)  # else it may come of weights that were kept
        return difference

    def _check_is_nearer(self, version: int, theirs: Scores, ours: Scores, before: _Before) -> None:
        """Refuse an engine that is nearer to the weights before, where the step moved them visibly.

        A small step stays within any tolerance; but then a stale engine agrees with the old weights, not the new ones.
        """
        disagreement, from_old = _distance(theirs, ours), _distance(theirs, before.ours)
        # as on these very sequences, which may be easier than others, but no less and no more than lately: they may
        # agree by chance, and a stale engine disagrees by what it is behind
        lately = min(self._disagreements), max(self._disagreements)
        on_equal_weights = float(np.clip(_distance(before.theirs, before.ours), *lately))
        if _distance(ours, before.ours) > _CLEAR * on_equal_weights and from_old < disagreement:
            raise WorkerError(
                f"weight sync failed: at version {version} the engine still holds the weights of the version before: "
                f"it is {from_old:.3g} nats from those, and {disagreement:.3g} from the published ones"
            )

    async def _check_follows(self, version: int, theirs: Scores, ours: Scores, before: _Before) -> None:
        """Refuse an engine whose scores do not follow the learner's over many steps, where its weights should.

        Those of a model that was published in bfloat16 stay for a while where they are, and so does a healthy engine.
        """
        self._following.add(_movement(before.theirs, theirs), _movement(before.ours, ours))
        slope = self._following.slope_of_stillness()
        if slope is None:
            return
        if (await self._find_changes()).kept > _KEPT:
            raise WorkerError(
                f"weight sync failed: at version {version} the engine does not follow the learner: over the last steps "
                f"its log-probabilities moved by {max(0.0, slope):.0%} of what the learner's did, where its noise "
                "leaves no doubt that this is too little; it goes on with weights of a version before"
            )
        self._following.clear()

    async def _count_unmoved(self, version: int, ours: Scores, before: _Before) -> None:
        """Refuse an engine whose own scores stay equal to the last bit while the weights move.

        One step may be too small for its rounding, so what it should have moved is added up until it does. An engine
        that rounds to steps of `u` nats is off by `u / 4` on average, and a score that moves by `d` comes out otherwise
        with probability `d / u`; the disagreement of equal weights bounds `u` from above.
        """
        step = max(_FINEST, 4 * max(self._disagreements))
        moved = np.abs(_movement(before.ours, ours))
        if not moved.any():
            return
        num_scores = self._unmoved.num_scores + float(np.minimum(1.0, moved / step).sum())
        num_weights = self._unmoved.num_weights
        if num_scores > _MANY_SCORES:
            num_weights += (await self._find_changes()).num_weights
        self._unmoved = _Unmoved(num_scores, num_weights)
        if num_weights > _MANY_WEIGHTS:
            raise WorkerError(
                f"weight sync failed: at version {version} the engine computes with weights of a version before: its "
                f"log-probabilities are equal to the last bit, where about {num_scores:.0f} of them should have moved "
                f"since they last did, with {num_weights} weights"
            )

    async def _find_changes(self) -> Changes:
        """What came of the last step, in the two folders."""
        assert self._folder is not None
        new, old = (self._folder / f"slot{(self._num_published - back) % 2}" for back in (1, 2))
        return await asyncio.to_thread(find_changes, old, new, turn=self._num_published)


def publish_place() -> Path:
    """The folder below which weights are published: shared memory, or where there is none, the temporary folder."""
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def strain(mean: float, largest: float, tolerance: float) -> float:
    """How much of the tolerance two sides use up that differ by so many nats on average and at most; 1 just passes."""
    return float(np.maximum(mean, largest / _WORST) / tolerance)


def _distance(left: Scores, right: Scores) -> float:
    """Mean absolute difference over all tokens, in nats."""
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def _movement(before: Scores, after: Scores) -> NDArray[np.float64]:
    """How far each token's score moved, in nats."""
    return np.concatenate(after).astype(np.float64) - np.concatenate(before)


def _sweep(parent: Path) -> None:
    """Remove what runs that were killed left behind."""
    for path in parent.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
