"""From groups to what the learner trains on: who is valid, and with which advantage.

Invariant: a pure function of (groups, configuration), so that a recorded step can be made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from palaestra.trainer.advantages import estimate_advantages
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.config import GRPOConfig
from palaestra.types import Group, Outcome

_MIN_VALID = 2


def is_trainable(outcome: Outcome, config: GRPOConfig) -> bool:
    """Whether an episode of this outcome may get an advantage and vote in its group's baseline."""
    return outcome is Outcome.SCORED or (config.train_on_truncated and outcome is Outcome.TRUNCATED)


def objection_to(group: Group, config: GRPOConfig) -> str | None:
    """Why a group cannot teach anything: too few valid members for a baseline, or (if configured) no variance."""
    rewards = [e.reward for e in group.episodes if is_trainable(e.outcome, config)]
    if len(rewards) < _MIN_VALID:
        return "late" if any(e.outcome is Outcome.CANCELLED for e in group.episodes) else "invalid"
    if config.drop_zero_variance and len(set(rewards)) == 1:
        return "zero_variance"
    return None


def make_rows(groups: Sequence[Group], config: GRPOConfig) -> list[TrainRow]:
    """Trajectories with their group-relative advantages; only valid siblings vote, invalid ones are left out."""
    rows: list[TrainRow] = []
    for group in groups:
        is_valid_G = np.array([is_trainable(e.outcome, config) and e.trajectory is not None for e in group.episodes])
        rewards_G = np.array([e.reward if e.reward is not None else math.nan for e in group.episodes])
        advantages_G = estimate_advantages(config.advantage, rewards_G, is_valid_G)
        for episode, advantage, is_valid in zip(group.episodes, advantages_G, is_valid_G, strict=True):
            if is_valid and episode.trajectory is not None and episode.trajectory.num_sampled:
                rows.append(TrainRow(trajectory=episode.trajectory, advantage=float(advantage)))
    return rows
