"""Configuration of a training run. Every key does something; contradictions are refused."""

from __future__ import annotations

from typing import Literal

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
    mode: Literal["async", "sync"] = "async"
    """`sync` waits for each update before it generates again; the same as `max_lag` 0."""
    max_lag: int = Field(default=1, ge=0)
    """Oldest token a group may have when it is trained, in policy versions; older groups are replaced."""
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
    save_every: int = Field(default=10, ge=1)
    """Updates between checkpoints."""
    canary_every: int = Field(default=1, ge=1)
    """Updates between checks that engine and learner agree."""
    canary_tolerance: float = Field(default=0.05, gt=0)
    """Largest difference of a log-probability that the check allows, in nats; bfloat16 needs about 0.02."""
    step_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for one batch; then the run stops and says who waited for whom."""

    @model_validator(mode="before")
    @classmethod
    def _sync_has_no_lag(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("mode") == "sync":
            return {"max_lag": 0, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> GRPOConfig:
        if self.mode == "sync" and self.max_lag > 0:
            raise ValueError(f"mode 'sync' contradicts max_lag {self.max_lag}: leave max_lag out, or use mode 'async'")
        if self.mode == "async" and self.max_lag == 0:
            raise ValueError("max_lag 0 is synchronous training: say mode 'sync', or give a max_lag of 1 or 2")
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
