"""What is measured: the runs, in the order in which they are played, and the settings that they share.

Invariant: a run's name says all that differs between it and the others; whatever is not in the name is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks._lag.desk import ENV_ID

from palaestra.agents import Sampling
from palaestra.agents.engines import EngineConfig
from palaestra.envs import EnvSuite
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import LearnerConfig

Mode = Literal["async", "one-step", "sync"]

LATENCIES_MS = (0, 100, 500)
GROUP_SIZE, GROUPS_PER_STEP = 8, 8
SAVE_EVERY = 5
NUM_HELD_OUT = 250
STRAGGLER_MS, STRAGGLER_FACTOR = 50, 20
DEADLINE_S = 3.0
STRAGGLER_SAMPLES = 2
NUM_STRAGGLER_TASKS = 1000

ENGINE = EngineConfig(max_model_len=512, kv_cache_mb=512, max_num_seqs=128)
_MIN_WAVES, _MIN_BATCHES = 2, 6
_CONCURRENCY = 5 * GROUP_SIZE * GROUPS_PER_STEP
"""Never the limit: what is played at once is decided by the lag alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of the loop."""

    name: str
    mode: Mode
    max_lag: int

    @property
    def num_batches(self) -> int:
        """Batches that may be in play at once while nothing is learned."""
        return self.max_lag + 1 if self.mode == "async" else 1


SYNC = Setting(name="sync", mode="sync", max_lag=0)
SETTINGS = (
    SYNC,
    Setting(name="one-step", mode="one-step", max_lag=1),
    Setting(name="async-1", mode="async", max_lag=1),
    Setting(name="async-2", mode="async", max_lag=2),
    Setting(name="async-4", mode="async", max_lag=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run."""

    name: str
    setting: Setting
    seed: int
    updates: int
    latency_ms: int
    slow_factor: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    """Settings of the loop beyond the mode: spare rollouts, a deadline."""

    @property
    def is_of_stragglers(self) -> bool:
        """Whether the tools are slow in some tasks."""
        return self.slow_factor != 1.0

    def suite(self) -> EnvSuite:
        """What it plays."""
        options = {"latency_s": self.latency_ms / 1000, "slow_factor": self.slow_factor}
        return EnvSuite({ENV_ID: 1.0}, form="compact", options={ENV_ID: options})

    def config(self) -> GRPOConfig:
        """How it trains."""
        return GRPOConfig(
            steps=self.updates,
            mode=self.setting.mode,
            max_lag=self.setting.max_lag,
            group_size=GROUP_SIZE,
            groups_per_step=GROUPS_PER_STEP,
            concurrency=_CONCURRENCY,
            seed=self.seed,
            learner=LearnerConfig(learning_rate=3e-4, num_minibatches=2, seed=self.seed),
            engine_config=ENGINE,
            sampling=Sampling(max_tokens=32),
            save_every=SAVE_EVERY,
            num_checkpoints=self.updates,
            **self.extra,
        )


REMEDIES: dict[str, tuple[Setting, dict[str, Any]]] = {
    "sync": (SYNC, {}),
    "sync, 2 spare": (SYNC, {"num_spare": 2}),
    f"sync, {DEADLINE_S:g} s deadline": (SYNC, {"group_timeout_s": DEADLINE_S}),
    "async-2": (SETTINGS[3], {}),
}
"""What is compared on tasks of which some are slow."""


def suite_at_rest() -> EnvSuite:
    """The held-out tasks, whose tools answer at once."""
    return EnvSuite({ENV_ID: 1.0}, form="compact").split("test")


def lag_runs(seed: int, updates: int) -> list[Run]:
    """Every setting with every latency, for one seed."""
    return [
        Run(
            name=f"{setting.name}-{ms}ms-seed{seed}-{updates}updates",
            setting=setting,
            seed=seed,
            updates=updates,
            latency_ms=ms,
        )
        for ms in LATENCIES_MS
        for setting in SETTINGS
    ]


def straggler_runs(seed: int, updates: int) -> list[Run]:
    """Every remedy on tasks of which some are slow, for one seed."""
    return [
        Run(
            name=f"stragglers-{number}-seed{seed}-{updates}updates",
            setting=setting,
            seed=seed,
            updates=updates,
            latency_ms=STRAGGLER_MS,
            slow_factor=STRAGGLER_FACTOR,
            extra=extra,
        )
        for number, (setting, extra) in enumerate(REMEDIES.values())
    ]


def alone_of(run: Run) -> Run:
    """What is played to measure generation alone as `run` generates: a first wave, and some that count."""
    num_batches = run.setting.num_batches
    waves = max(_MIN_WAVES, -(-_MIN_BATCHES // num_batches))
    return replace(run, name=f"alone-{run.name}", updates=num_batches * (1 + waves))


def all_runs(seeds: Sequence[int], updates: int) -> list[Run]:
    """In the order of play: a whole seed with its stragglers before the next one."""
    return [run for seed in seeds for run in (*lag_runs(seed, updates), *straggler_runs(seed, updates))]
