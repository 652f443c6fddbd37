"""What one update was made of: one record a step, kept in the ledger and plotted in the report."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from palaestra.trainer.learner import StepReport
from palaestra.types import Episode, Group, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Where the loop's wall clock went in one step, in seconds: waiting for a batch, learning, weight sync."""

    wait_s: float
    learn_s: float
    sync_s: float

    @property
    def wall_s(self) -> float:
        """The whole step."""
        return self.wait_s + self.learn_s + self.sync_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything worth plotting about one update.

    `use_*` are shares of the step's wall clock: of the engine computing, of the learner computing, and of
    the episode slots that were inside an environment. `num_turns_cut` are the turns that cut episodes had by
    then, if they had begun: where they exceed `num_turns`, cutting favours short episodes. `num_versions` counts the
    versions that sampled the trained episodes. `engine_busy_s` is a total over the run's lives, without what a life
    computed after its last step.
    """

    step: int
    wall_s: float
    wait_s: float
    learn_s: float
    sync_s: float
    reward: float
    success: float
    success_by_env: Mapping[str, float]
    terms: Mapping[str, float]
    outcomes: Mapping[str, int]
    lag_mean: float
    lag_max: int
    num_versions: int
    num_episodes: int
    num_sampled_tokens: int
    num_turns: float
    num_turns_cut: float
    zero_variance: float
    dropped: Mapping[str, int]
    generated: int
    verified: int
    use_engine: float
    use_learner: float
    use_envs: float
    engine_busy_s: float
    canary: float | None
    learner: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; values that are not finite become None."""
        return {key: _finite(value) for key, value in asdict(self).items()}


def summarise_step(
    groups: Sequence[Group],
    *,
    report: StepReport,
    times: StepTimes,
    dropped: Sequence[str],
    canary: float | None,
    engine_busy_s: float,
    engine_busy_before_s: float,
    generated: int,
    verified: int,
    concurrency: int,
    is_trained: Callable[[Outcome], bool],
) -> StepRecord:
    """The record of the step that trained `groups`; means are over episodes with a score.

    `is_trained` says of which outcomes an episode is trained.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    scored = [e for e in episodes if e.reward is not None]
    cut = [e for e in episodes if e.outcome is Outcome.CANCELLED and e.timings]  # those that began have times
    lags = [report.version - 1 - group.oldest_version for group in groups if group.oldest_version is not None]
    env_s = sum(e.timings.get("env_s", 0.0) for e in episodes)
    wall_s = max(times.wall_s, 1e-9)
    return StepRecord(
        step=report.version,
        wall_s=times.wall_s,
        wait_s=times.wait_s,
        learn_s=times.learn_s,
        sync_s=times.sync_s,
        reward=_mean([e.reward for e in scored if e.reward is not None]),
        success=_mean([float(e.is_success) for e in scored]),
        success_by_env=_success_by_env(scored),
        terms=_mean_contributions(scored),
        outcomes=dict(Counter(e.outcome.value for e in episodes)),
        lag_mean=_mean(lags),
        lag_max=max(lags, default=0),
        num_versions=len(_versions([e for e in scored if is_trained(e.outcome)])),
        num_episodes=len(episodes),
        num_sampled_tokens=sum(e.trajectory.num_sampled for e in episodes if e.trajectory is not None),
        num_turns=_mean([float(len(e.turns)) for e in episodes if e.outcome is not Outcome.CANCELLED]),
        num_turns_cut=_mean([float(len(e.turns)) for e in cut]),
        zero_variance=_mean([float(_has_one_reward(group, is_trained)) for group in groups]),
        dropped=dict(Counter(dropped)),
        generated=generated,
        verified=verified,
        use_engine=min(1.0, (engine_busy_s - engine_busy_before_s) / wall_s),
        use_learner=min(1.0, times.learn_s / wall_s),
        use_envs=min(1.0, env_s / wall_s / concurrency),
        engine_busy_s=engine_busy_s,
        canary=canary,
        learner=dict(report.metrics),
    )


def one_line(record: StepRecord) -> str:
    """The record in one line for the terminal."""
    by_env = " ".join(f"{_short(env_id)} {rate:.2f}" for env_id, rate in record.success_by_env.items())
    terms = " ".join(f"{name} {value:+.2f}" for name, value in record.terms.items())
    dropped = ", ".join(f"{count} {reason}" for reason, count in record.dropped.items()) or "0"
    return (
        f"update {record.step}: reward {record.reward:+.3f} success {record.success:.2f} ({by_env}) | {terms} | "
        f"rollouts {record.generated} verified {record.verified} dropped {dropped} | "
        f"lag {record.lag_mean:.1f} (max {record.lag_max}) | use: engine {record.use_engine:.0%} "
        f"learner {record.use_learner:.0%} envs {record.use_envs:.0%} | {record.wall_s:.1f} s"
    )


def _versions(episodes: Sequence[Episode]) -> set[int]:
    trajectories = [e.trajectory for e in episodes if e.trajectory is not None]
    return {int(version) for t in trajectories for version in np.unique(t.versions[t.loss_mask])}


def _short(env_id: str) -> str:
    return env_id.rpartition("/")[2].partition("-")[0]


def _mean(values: Sequence[float] | Sequence[int]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _success_by_env(episodes: Sequence[Episode]) -> dict[str, float]:
    by_env: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        by_env[episode.env_id].append(float(episode.is_success))
    return {env_id: _mean(values) for env_id, values in sorted(by_env.items())}


def _mean_contributions(episodes: Sequence[Episode]) -> dict[str, float]:
    by_term: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for term in episode.terms:
            by_term[term.name].append(term.contribution)
    return {name: _mean(values) for name, values in by_term.items()}


def _has_one_reward(group: Group, is_trained: Callable[[Outcome], bool]) -> bool:
    return len({e.reward for e in group.episodes if is_trained(e.outcome)}) <= 1


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value
