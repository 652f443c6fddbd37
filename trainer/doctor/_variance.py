"""Whether groups of the model itself differ: without variance within a group there is no gradient."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from palaestra.agents import Policy, episode_seed, run_episode
from palaestra.envs import EnvSuite
from palaestra.resources import Resources
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor._check import Finding, failure, ok, warning
from palaestra.trainer.rows import is_trainable
from palaestra.types import Episode, Task

_NUM_GROUPS = 6
_MAX_GROUP = 16
_NEARLY_ALL = 0.9


@dataclass(slots=True)
class SampledGroups:
    """Finished episodes by the number of their group; grows while groups are played."""

    episodes: dict[int, list[Episode]] = field(default_factory=dict)

    def all(self) -> list[Episode]:
        """Every episode."""
        return [episode for group in self.episodes.values() for episode in group]


async def sample_groups(
    policy: Policy, suite: EnvSuite, config: GRPOConfig, resources: Resources, limit_s: float
) -> SampledGroups:
    """The run's first groups, a few, as it would play them; after `limit_s` seconds those that are there."""
    groups = SampledGroups()
    slots = asyncio.Semaphore(config.concurrency)
    size = min(config.group_size, _MAX_GROUP)

    async def play(number: int, position: int, task: Task) -> None:
        async with slots:
            env = suite.make(task.env_id, resources=resources)
            seed = episode_seed(config.seed, task, number * config.group_size + position)
            episode = await run_episode(env, policy, task, episode_id=f"{number}.{position}", seed=seed)
        groups.episodes.setdefault(number, []).append(episode)

    scope = asyncio.timeout(limit_s)
    try:
        async with scope, asyncio.TaskGroup() as tasks:
            for number in range(_NUM_GROUPS):
                task = suite.draw(number, seed=config.seed)
                for position in range(size):
                    tasks.create_task(play(number, position, task))
    except TimeoutError:
        if not scope.expired():
            raise
    return groups


def judge_variance(groups: SampledGroups, config: GRPOConfig, *, is_new: bool) -> Finding:
    """Whether GRPO would move; of a model that is yet to be warmed up it is only told."""
    episodes = groups.all()
    if not episodes:
        return warning(
            "no episode ended in time, so that nothing is known of groups",
            "free the machine, lower sampling.max_tokens, or take a smaller model",
        )
    failed = [episode for episode in episodes if episode.failure is not None]
    if len(failed) > config.max_failure_rate * len(episodes):
        first = failed[0].failure
        why = f"{first.kind}: {first.message}" if first is not None else ""
        return failure(f"{len(failed)} of {len(episodes)} episodes failed on our side, the first: {why}", "mend it")
    valid = [rewards for group in groups.episodes.values() if len(rewards := _rewards(group, config)) > 1]
    solved = sum(episode.is_success for episode in episodes) / len(episodes)
    if not valid:
        return warning(
            f"nothing is known of variance: of {len(episodes)} episodes no two of a group have a reward to train on",
            "see how they end, raise their limits or sampling.max_tokens, or train_on_truncated",
        )
    share = sum(len(set(rewards)) == 1 for rewards in valid) / len(valid)
    truncated = sum(episode.outcome == "truncated" for episode in episodes) / len(episodes)
    detail = (
        f"{share:.0%} of {len(valid)} groups have equal rewards; {solved:.0%} of {len(episodes)} episodes "
        f"are solved, {truncated:.0%} truncated"
    )
    if is_new:
        return ok(f"{detail} (random weights, before imitation: for information)")
    if share >= _NEARLY_ALL:
        hard = "easier tasks or imitation first" if solved < 0.5 else "harder tasks"
        return warning(f"{detail}: GRPO does not move", f"use {hard}, larger groups, or a reward with more shades")
    return ok(detail)


def _rewards(group: Sequence[Episode], config: GRPOConfig) -> list[float]:
    return [e.reward for e in group if e.reward is not None and is_trainable(e.outcome, config)]
