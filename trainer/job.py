"""A training job as a TOML file: a model, a suite, how to train.

Invariant: modules that the file names are imported before it is checked, since the check looks up what they register.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from palaestra.config import Config
from palaestra.envs import EnvSuite
from palaestra.trainer.config import GRPOConfig
from palaestra.types import Form


class SuiteConfig(Config):
    """What to play."""

    weights: dict[str, float]
    """Environments and how often each is drawn."""
    form: Form = "full"
    """How tasks are worded."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Constructor arguments by environment."""

    def build(self) -> EnvSuite:
        """The suite; raises `ConfigError` for an unknown environment or a wrong weight."""
        return EnvSuite(self.weights, form=self.form, options=self.options)


class Job(Config):
    """A training job."""

    model: str
    """Hugging Face model folder or id."""
    run: Path | None = None
    """Run folder."""
    imports: list[str] = Field(default_factory=list)
    """Modules of yours that register environments, losses and advantages."""
    suite: SuiteConfig
    """What to play."""
    train: GRPOConfig = GRPOConfig()
    """How to train."""


def listed_modules(values: Mapping[str, Any]) -> list[str]:
    """What an unchecked job names under `imports`."""
    listed = values.get("imports")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
