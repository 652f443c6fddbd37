"""The episodes whose lengths and times stand for all others: the model's own, or else the scripted expert's.

Invariant: an episode that failed on our side is never among them, and it is said whose they are and how few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from palaestra.agents import Renderer
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError, TaskError, WorkerError
from palaestra.resources import Resources
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.demonstrations import collect, tokenize
from palaestra.trainer.sizing._load import Player, Watch
from palaestra.trainer.sizing._measured import EpisodeWork
from palaestra.types import Episode, Trajectory

_FEW_SLOTS = 4
_NUM_EXPERT_EPISODES = 8
_ENOUGH_EPISODES = 2
_FEW_EPISODES = 16


@dataclass(frozen=True, slots=True)
class Stage:
    """Where episodes are played, and how their text becomes tokens."""

    suite: EnvSuite
    renderer: Renderer
    resources: Resources
    config: GRPOConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Whose episodes are looked at, what they were made of, and their tokens."""

    is_model: bool
    work: tuple[EpisodeWork, ...]
    trajectories: tuple[Trajectory, ...]
    notes: tuple[str, ...]


async def play_some(stage: Stage, player: Player, watch: Watch, seconds: float) -> Played:
    """Episodes of the model, few at a time; the expert's where fewer than two ended within `seconds`.

    Raises `WorkerError` when all failed, `ConfigError` when neither can play.
    """
    slots = min(_FEW_SLOTS, stage.config.concurrency)
    episodes, _ = await player.play(watch, slots=slots, seconds=seconds)
    usable = [e for e in episodes if e.trajectory is not None and e.turns and e.failure is None]
    if episodes and not usable:
        failure = next((e.failure for e in episodes if e.failure is not None), None)
        reason = f"{failure.kind}: {failure.message}" if failure is not None else "no turn was taken"
        raise WorkerError(f"none of {len(episodes)} episodes can be measured; the first: {reason}")
    if len(usable) < _ENOUGH_EPISODES:
        return await _play_expert(stage, seconds)
    trajectories = tuple(e.trajectory for e in usable if e.trajectory is not None)
    return Played(
        is_model=True, work=_work_of(usable, trajectories), trajectories=trajectories, notes=tuple(doubts(usable))
    )


async def _play_expert(stage: Stage, seconds: float) -> Played:
    few = f"fewer than {_ENOUGH_EPISODES} episodes of the model ended within {seconds:.0f} s"
    episodes: dict[str, Episode] = {}
    try:
        demonstrations = await collect(
            stage.suite,
            _NUM_EXPERT_EPISODES,
            skill=1.0,
            seed=stage.config.seed,
            resources=stage.resources,
            on_episode=lambda episode: episodes.update({episode.task.id: episode}),
        )
    except TaskError as error:
        raise ConfigError(f"{few}, and no expert can play instead ({error}); give more time with --seconds") from error
    trajectories = tuple(tokenize(demonstrations, stage.renderer))
    played = [episodes[demonstration.task_id] for demonstration in demonstrations]
    note = f"{few}: lengths are those of the scripted expert; give more time with --seconds"
    return Played(is_model=False, work=_work_of(played, trajectories), trajectories=trajectories, notes=(note,))


def _work_of(episodes: Sequence[Episode], trajectories: Sequence[Trajectory]) -> tuple[EpisodeWork, ...]:
    return tuple(
        EpisodeWork(
            num_turns=len(episode.turns),
            num_sampled=trajectory.num_sampled,
            num_inputs=inputs_of(trajectory),
            env_s=episode.timings.get("env_s", math.fsum(turn.env_s for turn in episode.turns)),
        )
        for episode, trajectory in zip(episodes, trajectories, strict=True)
    )


def prompts_of(trajectory: Trajectory) -> list[list[int]]:
    """The prompt of each turn, in order: everything before the tokens that were sampled for it."""
    mask = trajectory.loss_mask
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    return [trajectory.ids[:start].tolist() for start in starts]


def inputs_of(trajectory: Trajectory) -> int:
    """Tokens that go through the learner: all before the last sampled one, which only is predicted."""
    return int(np.flatnonzero(trajectory.loss_mask)[-1])


def doubts(episodes: Sequence[Episode]) -> list[str]:
    """What makes the model's episodes a weak basis for a prediction."""
    found = []
    if len(episodes) < _FEW_EPISODES:
        found.append(f"only {len(episodes)} episodes ended in time: lengths are rough; give more time with --seconds")
    if not any(turn.num_calls > turn.num_invalid_calls for episode in episodes for turn in episode.turns):
        found.append(
            "the model made no valid call, so its episodes do not use the environments; once it learns to, turns and "
            "environment time grow: measure again then"
        )
    return found
