"""A round: one life with one kill, and everything that must hold after it. Tests and the benchmark play the same."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palaestra.envs import EnvSuite
from tests.chaos import audit
from tests.chaos.draws import Kill, Pace, draw_kill
from tests.chaos.lives import Life, Run
from tests.chaos.twins import differences

_COMMON: Mapping[str, Any] = {
    "steps": 14,
    "group_size": 4,
    "groups_per_step": 3,
    "save_every": 4,
    "drop_zero_variance": True,
    "concurrency": 12,
    "sampling": {"max_tokens": 10},
    "engine_config": {"max_model_len": 96, "max_num_seqs": 16, "kv_cache_mb": 16},
    "learner": {"learning_rate": 1e-3},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """An engine and how far it may run ahead."""

    engine: str
    mode: str
    max_lag: int

    @property
    def name(self) -> str:
        return f"{self.engine} {self.mode}" + (f" lag {self.max_lag}" if self.mode == "async" else "")

    @property
    def is_exact(self) -> bool:
        """Whether a run that was killed must equal one that was not."""
        return self.engine == "transformers" and self.mode == "sync"

    def config(self, **changes: Any) -> dict[str, Any]:
        return {**_COMMON, "engine": self.engine, "mode": self.mode, "max_lag": self.max_lag, **changes}


SYNC = Scenario(engine="transformers", mode="sync", max_lag=0)
SCENARIOS = (
    SYNC,
    Scenario(engine="transformers", mode="one-step", max_lag=1),
    Scenario(engine="transformers", mode="async", max_lag=1),
    Scenario(engine="transformers", mode="async", max_lag=2),
    Scenario(engine="vllm", mode="one-step", max_lag=1),
    Scenario(engine="vllm", mode="async", max_lag=1),
    Scenario(engine="vllm", mode="async", max_lag=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a round was and found. Episodes `kept` are those on record after it, `anew` those under way that its kill
    left to the next life, `lost` those that were on record before it and are not, or not as they were."""

    kill: str
    whom: str
    phase: str
    was_killed: bool
    is_over: bool
    wall_s: float
    ready_s: float | None
    num_made_again: int
    step: int
    kept: int
    anew: int
    lost: int
    complaints: tuple[str, ...]


def play_round(run: Run, kill: Kill | None, *, twin: Run | None = None) -> Round:
    """Live once, with `kill` if given; at the end of the run compare it with its unbroken `twin` if given."""
    before = audit.take(run.ledger)
    life = run.live(kill)
    after = audit.take(run.ledger)
    complaints = [*life.complaints, *audit.check(after, EnvSuite(dict(run.suite))), *audit.check_kept(before, after)]
    complaints += [note for note in life.notes if "came out otherwise" in note]
    if life.is_over:
        complaints += _check_end(run, after, twin)
    return _round(kill, life, before, after, complaints)


def draw_and_play(run: Run, rng: random.Random, *, pace: Pace, twin: Run | None = None) -> Round:
    """A round with a kill that suits the run's state."""
    snapshot = audit.take(run.ledger)
    kill = draw_kill(rng, run.run, snapshot, steps=run.config["steps"], pace=pace)
    return play_round(run, kill, twin=twin)


def _check_end(run: Run, after: audit.Snapshot, twin: Run | None) -> list[str]:
    if after.last_step != run.config["steps"]:
        return [f"it is over after {after.last_step} of {run.config['steps']} steps"]
    return differences(twin.run, run.run) if twin is not None else []


def _round(
    kill: Kill | None, life: Life, before: audit.Snapshot, after: audit.Snapshot, complaints: list[str]
) -> Round:
    return Round(
        kill=kill.name if kill is not None else "none",
        whom=kill.whom if kill is not None else "none",
        phase=life.phase,
        was_killed=life.was_killed,
        is_over=life.is_over,
        wall_s=life.wall_s,
        ready_s=life.ready_s,
        num_made_again=life.num_made_again,
        step=after.last_step,
        kept=len(after.plays),
        anew=after.num_open if life.was_killed else 0,
        lost=sum(after.plays.get(key) != play for key, play in before.plays.items()),
        complaints=tuple(complaints),
    )
