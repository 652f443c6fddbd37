"""Evaluation: a policy on tasks of a suite, several samples each, as rates with intervals.

Invariant: an episode that failed on our side is never counted as a wrong answer; it is reported beside the
rate. One that ran out of turns, context or time is not solved.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from palaestra.agents._policy import Policy
from palaestra.agents._runner import run_episode
from palaestra.agents._statistics import Proportion, pass_at_k, wilson_of_tasks
from palaestra.envs import EnvSuite
from palaestra.errors import refuse_inside_a_loop, ungrouped
from palaestra.resources import Resources
from palaestra.types import Episode, Outcome, Task

OnEpisode = Callable[[Episode], None]

_ANSWERED = (Outcome.SCORED, Outcome.TRUNCATED, Outcome.TIMEOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """What an evaluation found: overall and by environment, with every episode."""

    policy: str
    success: Proportion
    by_env: dict[str, Proportion]
    mean_reward: float
    pass_at: dict[int, float]
    outcomes: dict[str, int]
    terms: dict[str, float]
    episodes: tuple[Episode, ...]

    @property
    def num_failed(self) -> int:
        """Episodes that failed on our side, so that they count in no rate."""
        return sum(episode.failure is not None for episode in self.episodes)

    @property
    def commonest_failure(self) -> str | None:
        """The message that most failed episodes carry; None when none failed."""
        messages = Counter(episode.failure.message for episode in self.episodes if episode.failure is not None)
        return messages.most_common(1)[0][0] if messages else None

    def to_json(self) -> dict[str, Any]:
        """The report without its episodes, as JSON; what is not a number here is null there."""
        return {
            "policy": self.policy,
            "success": _to_json(self.success),
            "by_env": {env_id: _to_json(value) for env_id, value in self.by_env.items()},
            "mean_reward": _or_null(self.mean_reward),
            "pass_at": {str(k): value for k, value in self.pass_at.items()},
            "outcomes": self.outcomes,
            "terms": self.terms,
            "commonest_failure": self.commonest_failure,
        }


def _to_json(value: Proportion) -> dict[str, float | None]:
    return {name: _or_null(number) for name, number in asdict(value).items()}


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(
    policy: Policy,
    suite: EnvSuite,
    *,
    tasks: int = 100,
    samples: int = 1,
    concurrency: int = 16,
    seed: int = 0,
    on_episode: OnEpisode | None = None,
) -> EvalReport:
    """`aevaluate`, run to its end; raises `ConfigError` inside a running event loop."""
    refuse_inside_a_loop("evaluate()", "aevaluate()")
    return asyncio.run(
        aevaluate(
            policy, suite, tasks=tasks, samples=samples, concurrency=concurrency, seed=seed, on_episode=on_episode
        )
    )


async def aevaluate(
    policy: Policy,
    suite: EnvSuite,
    *,
    tasks: int = 100,
    samples: int = 1,
    concurrency: int = 16,
    seed: int = 0,
    resources: Resources | None = None,
    on_episode: OnEpisode | None = None,
) -> EvalReport:
    """Play `samples` episodes of each of the first `tasks` tasks of the suite's split, evenly over environments.

    Episodes run `concurrency` at a time; the sampling seed of each is a function of (seed, task, sample).
    """
    chosen = suite.tasks(tasks)
    jobs = ((task, sample) for sample in range(samples) for task in chosen)
    episodes: list[Episode] = []

    def keep(episode: Episode) -> None:
        episodes.append(episode)
        if on_episode is not None:
            on_episode(episode)

    with ungrouped():
        async with policy, Resources() as own:
            await _play_all(policy, suite, jobs, concurrency, seed, resources or own, keep)
    return summarise(policy.name, episodes, samples=samples)


async def _play_all(
    policy: Policy,
    suite: EnvSuite,
    jobs: Iterator[tuple[Task, int]],
    concurrency: int,
    seed: int,
    resources: Resources,
    keep: OnEpisode,
) -> None:
    async def work() -> None:
        for task, sample in jobs:
            env = suite.make(task.env_id, resources=resources)
            episode_id = f"{task.id}#{sample}"
            keep(await run_episode(env, policy, task, episode_id=episode_id, seed=episode_seed(seed, task, sample)))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())


def episode_seed(seed: int, task: Task, sample: int) -> int:
    """A 31-bit seed for one sample of one task, independent of the order of play."""
    text = np.frombuffer(task.id.encode(), np.uint8)
    return int(np.random.SeedSequence([seed, sample, *text.tolist()]).generate_state(1)[0] >> 1)


def summarise(policy_name: str, episodes: Sequence[Episode], *, samples: int = 1) -> EvalReport:
    """Rates and means over finished episodes, in a stable order."""
    ordered = tuple(sorted(episodes, key=lambda episode: episode.id))
    answered = [e for e in ordered if e.outcome in _ANSWERED]
    by_env: dict[str, list[Episode]] = defaultdict(list)
    for episode in answered:
        by_env[episode.env_id].append(episode)
    rewards = [e.reward for e in answered if e.reward is not None]
    counts = _by_task(answered)
    ks = sorted({1, samples})
    complete = bool(counts) and all(sampled >= samples for _, sampled in counts)
    return EvalReport(
        policy=policy_name,
        success=wilson_of_tasks(counts),
        by_env={env_id: wilson_of_tasks(_by_task(group)) for env_id, group in sorted(by_env.items())},
        mean_reward=math.fsum(rewards) / len(rewards) if rewards else math.nan,
        pass_at={k: pass_at_k(counts, k) for k in ks} if complete else {},
        outcomes=dict(Counter(e.outcome.value for e in ordered)),
        terms=_mean_terms(answered),
        episodes=ordered,
    )


def _by_task(episodes: Sequence[Episode]) -> list[tuple[int, int]]:
    """(number solved, number played) of each task."""
    tasks: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        tasks[episode.task.id].append(episode)
    return [(sum(e.is_success for e in group), len(group)) for group in tasks.values()]


def _mean_terms(episodes: Sequence[Episode]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for term in episode.terms:
            values[term.name].append(term.value)
    return {name: math.fsum(group) / len(group) for name, group in values.items()}
