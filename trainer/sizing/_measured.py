"""What a minute of measurement found: plain numbers, from which every prediction is a pure function.

Invariant: rates are above 0, and the two slowdowns and the overhead are at least 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

_QUIET_CORES = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeWork:
    """One played episode: its turns, tokens sampled, tokens that go through the learner, seconds in the environment."""

    num_turns: int
    num_sampled: int
    num_inputs: int
    env_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLevel:
    """Sampled tokens per second, of all requests together, while `concurrency` requests were always under way.

    Of several rounds the best; `worst_tokens_per_s` was the slowest of them.
    """

    concurrency: int
    tokens_per_s: float
    worst_tokens_per_s: float

    @property
    def token_s(self) -> float:
        """Seconds from one token of a request to its next, by Little's law."""
        return self.concurrency / self.tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerLevel:
    """Seconds per padded token in micro-batches of `tokens`, without the optimiser's fixed share."""

    tokens: int
    token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """A GPU that engine and learner share: MiB in all, and free while both held their most."""

    total_mb: float
    free_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Everything that was measured.

    `player` says whose episodes they are, `context` the most tokens that one can have. `learner_update_s` is what an
    update costs beside its tokens. `busy_sync_s` is a weight sync while episodes are played, `sync_s` one while the
    engine has nothing to do. `driver_s` are processor seconds of this process for each turn. `overhead` is how much
    longer real rollouts took than the queueing model says; the slowdowns are how much slower engine and learner were at
    the same time than alone. `rollout_scatter` is by how much rounds of the same rollouts differed. `cores` are the
    cores in use by phase and process.
    """

    player: Literal["model", "expert"]
    context: int
    episodes: tuple[EpisodeWork, ...]
    engine: tuple[EngineLevel, ...]
    learner: tuple[LearnerLevel, ...]
    learner_update_s: float
    sync_s: float
    busy_sync_s: float
    driver_s: float = 0.0
    overhead: float = 1.0
    rollout_scatter: float = 0.0
    engine_slowdown: float = 1.0
    learner_slowdown: float = 1.0
    num_cores: int = 1
    gpu_memory: GpuMemory | None = None
    cores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def turns_per_episode(self) -> float:
        """Mean number of turns."""
        return math.fsum(e.num_turns for e in self.episodes) / len(self.episodes)

    @property
    def tokens_per_turn(self) -> float:
        """Mean number of sampled tokens in a turn."""
        return tokens_per_turn(self.episodes)

    @property
    def env_s_per_turn(self) -> float:
        """Mean seconds inside the environment for each turn, begin and verdict included."""
        return math.fsum(e.env_s for e in self.episodes) / math.fsum(e.num_turns for e in self.episodes)

    @property
    def scatter(self) -> float:
        """Most by which a round of one load, of engine or rollouts, was slower than the best: a share of that one."""
        engine = (scatter_of((level.tokens_per_s, level.worst_tokens_per_s)) for level in self.engine)
        return max(*engine, self.rollout_scatter)

    @property
    def other_cores(self) -> float:
        """Most cores that other work used in any phase."""
        return max((used.get("others", 0.0) for used in self.cores.values()), default=0.0)

    @property
    def is_disturbed(self) -> bool:
        """Whether other work used the machine so much that small differences mean nothing."""
        return self.other_cores > _QUIET_CORES

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; of the episodes, their number and means."""
        values = asdict(self)
        values["episodes"] = len(self.episodes)
        values["engine"] = [asdict(level) | {"token_s": level.token_s} for level in self.engine]
        derived = ("turns_per_episode", "tokens_per_turn", "env_s_per_turn", "scatter")
        return values | {name: getattr(self, name) for name in derived}


def scatter_of(rates: Sequence[float]) -> float:
    """How much slower the slowest of some rounds was than the fastest, as a share of the fastest."""
    return 1.0 - min(rates) / max(rates)


def tokens_per_turn(episodes: Sequence[EpisodeWork]) -> float:
    """Mean number of sampled tokens in a turn of some episodes."""
    return math.fsum(each.num_sampled for each in episodes) / math.fsum(each.num_turns for each in episodes)
