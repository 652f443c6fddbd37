"""Settings of the main job; the defaults fit two cores and twelve minutes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from palaestra.agents import Sampling
from palaestra.agents.engines import EngineConfig
from palaestra.config import Config
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import LearnerConfig
from palaestra.trainer.sft import SFTConfig
from palaestra.trainer.tiny import TinyModelConfig
from palaestra.types import Form

PAGES = (
    "choose-list",
    "click-checkboxes",
    "click-collapsible-2",
    "click-option",
    "click-scroll-list",
    "click-tab-2",
    "enter-password",
    "enter-text-dynamic",
    "form-sequence-2",
    "login-user",
    "navigate-tree",
)
"""Eleven of the compact MiniWoB++ pages; the other four ask for a look-up that so small a model learns slowly."""
DEFAULT_WEIGHTS = {"palaestra/CodeRepair-v0": 1.0, "palaestra/MiniWoB-v0": 2.0, "palaestra/ToolDesk-v0": 1.5}


class QuickstartConfig(Config):
    """What to play, how much of it, and how to train."""

    seed: int = Field(default=0, ge=0)
    """Seed of everything: tasks, demonstrations, weights, sampling; wins over the seeds in `sft` and `rl`."""
    model: str | None = None
    """A Hugging Face model or folder; by default a small one is made from random weights."""
    family: str | None = None
    """Chat family of `model`, such as `qwen3`, where neither its name nor its folder tells."""
    form: Form = "compact"
    """How tasks are worded; large models want `full`."""
    weights: dict[str, float] = DEFAULT_WEIGHTS
    """Environments and how often each is drawn."""
    options: dict[str, dict[str, Any]] = Field(default_factory=lambda: {"palaestra/MiniWoB-v0": {"pages": list(PAGES)}})
    """Constructor arguments of environments, by id."""
    num_demonstrations: int = Field(default=3000, ge=3)
    """Episodes of the sloppy expert to imitate."""
    num_probe: int = Field(default=90, ge=3)
    """Episodes of the clean expert, on validation tasks, that tell when to stop imitating."""
    skill: float = Field(default=0.8, gt=0, le=1)
    """Chance that the sloppy expert takes its best decision; what is missing is left to RL."""
    num_eval_tasks: int = Field(default=360, ge=3)
    """Held-out tasks on which each policy is judged."""
    concurrency: int = Field(default=32, ge=1)
    """Episodes played at once in evaluations and demonstrations."""
    vocab_size: int = Field(default=768, ge=366)
    """Most tokens of the small model's vocabulary."""
    tiny: TinyModelConfig = TinyModelConfig()
    """The small model."""
    sft: SFTConfig = SFTConfig(max_steps=1200, max_seconds=150.0, probe_target=0.95)
    """Imitation. Longer than to a probe of 0.95, this model learns its few thousand demonstrations by heart."""
    rl: GRPOConfig = GRPOConfig(
        steps=100,
        group_size=8,
        groups_per_step=16,
        concurrency=64,
        learner=LearnerConfig(learning_rate=3e-4, num_minibatches=2),
        engine_config=EngineConfig(max_model_len=512, kv_cache_mb=256),
        sampling=Sampling(max_tokens=32),
    )
    """Reinforcement learning."""

    @property
    def seeded_sft(self) -> SFTConfig:
        """Imitation with the job's seed."""
        return self.sft.model_copy(update={"seed": self.seed})

    @property
    def seeded_rl(self) -> GRPOConfig:
        """Reinforcement learning with the job's seed and chat family."""
        learner = self.rl.learner.model_copy(update={"seed": self.seed})
        engine = self.rl.engine_config.model_copy(update={"seed": self.seed})
        seeded = {"seed": self.seed, "learner": learner, "engine_config": engine}
        return self.rl.model_copy(update={**seeded, "family": self.family or self.rl.family})


FOR_GIVEN_MODEL: dict[str, Any] = {
    "form": "full",
    "options": {},
    "num_demonstrations": 600,
    "sft": {"lr": 1e-5, "max_steps": 200, "max_seconds": 3600.0, "batch_size": 8, "average": 0.0},
    "rl": {
        "learner": {"learning_rate": 1e-6, "num_minibatches": 1, "max_micro_batch_tokens": 8192},
        "engine_config": {"max_model_len": 8192, "kv_cache_mb": 2048},
        "sampling": {"max_tokens": 512},
    },
}
"""What differs from the defaults where `model` is given: tasks and learning rates for a published model."""
