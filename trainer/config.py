"""Configuration of a training run. Every key does something; contradictions are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from palaestra.agents import Sampling
from palaestra.agents.engines import EngineConfig
from palaestra.config import Config, nearest
from palaestra.trainer.advantages import advantage_names
from palaestra.trainer.learner import LearnerConfig
from palaestra.trainer.losses import is_clipped


class GRPOConfig(Config):
    """Asynchronous group-relative policy optimisation (GRPO, arXiv:2402.03300)."""

    steps: int = Field(default=200, ge=1)
    """Policy updates in all."""
    group_size: int = Field(default=8, ge=2)
    """Episodes of each task; the baseline is among them."""
    groups_per_step: int = Field(default=16, ge=1)
    """Tasks in each update."""
    mode: Literal["async", "one-step", "sync"] = "async"
    """`sync` generates and learns in turns (`max_lag` 0). `one-step` plays one batch while the one before is learned,
    and swaps weights between batches (`max_lag` 1). `async` swaps them while episodes run."""
    max_lag: int = Field(default=1, ge=0)
    """Oldest token a group may have when it is trained, in policy versions; older groups are replaced."""
    num_spare: int = Field(default=0, ge=0)
    """Episodes of each group beyond `group_size`: once `group_size` ended, the rest are cut. Favours short ones."""
    group_timeout_s: float = Field(default=900.0, gt=0)
    """Longest play of a group, from its first episode on; what still runs then is cut, and the rest is trained. By
    default half of `step_timeout_s`."""
    advantage: str = "mean_centred"
    """Name of the advantage estimator."""
    train_on_truncated: bool = True
    """Whether episodes that ran out of turns or context get an advantage."""
    drop_zero_variance: bool = False
    """Replace groups whose episodes all have one reward (DAPO, arXiv:2503.14476) instead of counting them."""
    learner: LearnerConfig = LearnerConfig()
    """Loss, optimiser and memory of the learner."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples tokens."""
    engine_config: EngineConfig = EngineConfig()
    """Resources of the engine."""
    family: str | None = None
    """Chat family of the model, such as `qwen3`, where neither its name nor its folder tells."""
    sampling: Sampling = Sampling()
    """How rollouts are sampled; training needs `top_p` 1."""
    concurrency: int = Field(default=64, ge=1)
    """Episodes played at once."""
    seed: int = Field(default=0, ge=0)
    """Seed of tasks and sampling."""
    max_failure_rate: float = Field(default=0.25, ge=0, le=1)
    """Share of the last 64 episodes that may fail on our side before the run stops."""
    max_invalid_rate: float = Field(default=0.9, ge=0, le=1)
    """Share of the last 64 episodes that may get no advantage (timeouts and failures) before the run stops."""
    save_every: int = Field(default=10, ge=1)
    """Updates between checkpoints; those since the last one are made again from the ledger after a kill."""
    num_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that are kept: more of them make `palaestra replay` of old steps quicker."""
    canary_every: int = Field(default=1, ge=1)
    """Updates between checks that engine and learner agree."""
    canary_tolerance: float = Field(default=0.05, gt=0)
    """Mean difference of log-probabilities that the check allows, in nats, and a tenth of what a single one may differ;
    bfloat16 needs about 0.02."""
    step_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one batch; then the run stops and says who waited for whom."""
    stall_report_s: float = Field(default=120.0, gt=0)
    """A wait that lasts longer writes a report of who waits for whom, with stacks, into the run folder's logs."""

    @property
    def engine_settings(self) -> EngineConfig:
        """`engine_config` with what `auto` stands for in this run."""
        if self.engine_config.batch_invariant != "auto":
            return self.engine_config
        is_exact = self.mode == "sync" and self.engine == "transformers"
        return self.engine_config.model_copy(update={"batch_invariant": "always" if is_exact else "never"})

    @property
    def derived_keys(self) -> frozenset[str]:
        """Keys that say what the others say already, so that nobody need have chosen them."""
        derived = _derived({name: getattr(self, name) for name in self.model_fields_set})
        return frozenset(name for name, value in derived.items() if getattr(self, name) == value)

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, values: object) -> object:
        return {**_derived(values), **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> GRPOConfig:
        if self.mode == "sync" and self.max_lag > 0:
            raise ValueError(f"mode 'sync' contradicts max_lag {self.max_lag}: leave max_lag out, or use mode 'async'")
        if self.mode == "async" and self.max_lag == 0:
            raise ValueError("max_lag 0 is synchronous training: say mode 'sync', or give a max_lag of 1 or 2")
        if self.mode == "one-step" and self.max_lag != 1:
            raise ValueError(f"mode 'one-step' has max_lag 1, not {self.max_lag}: leave it out, or use mode 'async'")
        if self.group_timeout_s >= self.step_timeout_s:
            raise ValueError(
                f"group_timeout_s {self.group_timeout_s:g} must be below step_timeout_s {self.step_timeout_s:g}: one "
                "late group would end the run"
            )
        if self.engine == "vllm" and self.engine_config.batch_invariant == "always":
            raise ValueError("engine_config.batch_invariant 'always' needs engine 'transformers'")
        if self.max_lag > 0 and not is_clipped(self.learner.loss.name):
            raise ValueError(f"loss {self.learner.loss.name!r} has an unclipped ratio; it needs mode 'sync'")
        if self.sampling.top_p != 1.0:
            raise ValueError(f"sampling.top_p {self.sampling.top_p} biases the gradient: training needs 1")
        if self.sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be above 0: greedy groups have no variance")
        if self.sampling.temperature != self.learner.temperature:
            raise ValueError(
                f"sampling.temperature {self.sampling.temperature} differs from learner.temperature "
                f"{self.learner.temperature}: the ratio would compare two distributions"
            )
        if self.advantage not in advantage_names():
            raise ValueError(f"unknown advantage {self.advantage!r}{nearest(self.advantage, advantage_names())}")
        return self


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """What given keys make of those that are left out."""
    lags = {"sync": {"max_lag": 0}, "one-step": {"max_lag": 1}}
    limit_s = values.get("step_timeout_s")
    timeout = {"group_timeout_s": limit_s / 2} if isinstance(limit_s, int | float) else {}
    return {**lags.get(str(values.get("mode")), {}), **timeout}
