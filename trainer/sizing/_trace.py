"""What an episode asked of engine and learner, read off its tokens."""

from __future__ import annotations

import numpy as np

from palaestra.types import Trajectory


def prompts_of(trajectory: Trajectory) -> list[list[int]]:
    """The prompt of each turn, in order: everything before the tokens that were sampled for it."""
    mask = trajectory.loss_mask
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    return [trajectory.ids[:start].tolist() for start in starts]


def inputs_of(trajectory: Trajectory) -> int:
    """Tokens that go through the learner: all before the last sampled one, which only is predicted."""
    return int(np.flatnonzero(trajectory.loss_mask)[-1])
