"""Whether an engine's log-probabilities follow the learner's, seen over many steps through noise that hides each one.

Invariant: only movements are compared, before a step with after it, so neither what two sides always differ by nor what
a stale engine has fallen behind counts as noise.

An engine that follows moves by what the learner moves by, one that does not by nothing, both give or take noise: the
slope of the one over the other is 1 or 0 on average. Tokens of one canary may all be off together, steps are not: the
slope's error is taken from how it scatters over steps (each against the slope of the others, HC3 in MacKinnon and
White, 1985), never over tokens.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

_WINDOWS = (32, 64, 128, 256)
"""Steps that are looked at together: the smaller a step is beside the noise, the more of them it takes."""
_STILL = 0.25
"""An engine of a smaller slope is none that follows with an unlucky scatter."""
_FEWEST = 16
"""Fewer steps, which are much larger than all others, say nothing of how they scatter."""
_SURE = 6.0
"""Errors that the slope must be away from 1; by chance that is once in a million windows or less."""


class Following:
    """The movements of both sides, step by step."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=_WINDOWS[-1])

    def add(self, theirs: NDArray[np.float64], ours: NDArray[np.float64]) -> None:
        """Note by how much a step moved each score on either side: only how far both went the learner's way is kept.

        A step that did not move the learner's scores tells nothing.
        """
        if ours.any():
            length = float(np.linalg.norm(ours))
            self._steps.append((float(theirs @ ours) / length, length))

    def clear(self) -> None:
        """Begin anew."""
        self._steps.clear()

    def slope_of_stillness(self) -> float | None:
        """The slope of an engine that surely does not follow; None for all others."""
        if len(self._steps) < _WINDOWS[0]:
            return None
        steps = np.array(self._steps)
        for window in _WINDOWS:
            if len(steps) < window:
                break
            theirs, ours = steps[-window:].T
            slope = float(theirs.sum() / ours.sum())
            slope_of_others = (theirs.sum() - theirs) / (ours.sum() - ours)
            error = float(np.linalg.norm(theirs - slope_of_others * ours) / ours.sum())
            num_steps = float(ours.sum() ** 2 / (ours @ ours))  # as if all were equally large
            if slope < _STILL and 1 - slope > _SURE * error and num_steps > _FEWEST:
                return slope
        return None
