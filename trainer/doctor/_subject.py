"""What is examined: a training job, or the main job, whose model does not exist yet.

Invariant: `given` holds only keys that somebody chose, never those that a class sets by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from palaestra.agents.engines import fit_context
from palaestra.envs import EnvSuite
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.job import Job
from palaestra.trainer.quickstart import QuickstartConfig
from palaestra.trainer.tiny import TinyModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """A model that the job makes itself, from demonstrations and random weights."""

    size: TinyModelConfig
    vocab_size: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A job as the checks see it. `model` is a folder or hub name, or what is made anew."""

    model: str | NewModel
    suite: EnvSuite
    train: GRPOConfig
    given: frozenset[str]
    """Dotted keys that were chosen, such as `train.learner.learning_rate`."""
    prefix: str
    """What stands before the keys of `train`: `train.` or `rl.`."""
    run: Path | None = None
    """Where the run's folder will be, where that is known."""
    is_there: bool = True
    """Whether the model is there to be read, or made."""

    @classmethod
    def of_job(cls, job: Job, *, is_resolved: bool = False) -> Subject:
        """A training job; a resolved one lists every key, so that only changed ones count as chosen."""
        return cls(
            model=job.model,
            suite=job.suite.build(),
            train=job.train,
            given=frozenset(_chosen(job, is_resolved)),
            prefix="train.",
            run=job.run,
        )

    @classmethod
    def of_quickstart(
        cls, config: QuickstartConfig, *, is_resolved: bool = False, given: frozenset[str] | None = None
    ) -> Subject:
        """The main job; `given` where the configuration holds more than somebody chose."""
        new = NewModel(size=config.tiny, vocab_size=config.vocab_size, seed=config.seed)
        return cls(
            model=new if config.model is None else config.model,
            suite=EnvSuite(config.weights, form=config.form, options=config.options),
            train=config.seeded_rl,
            given=frozenset(_chosen(config, is_resolved)) if given is None else given,
            prefix="rl.",
        )

    @property
    def context(self) -> int:
        """Most tokens of a conversation: what is asked for, cut to what the model was made for."""
        config = self.train.engine_config
        if isinstance(self.model, NewModel):
            return min(config.max_model_len, self.model.size.max_positions)
        if not self.is_there:
            return config.max_model_len
        return fit_context(config, str(Path(self.model).expanduser())).max_model_len

    def chose(self, key: str) -> bool:
        """Whether somebody chose this key of `train`."""
        return self.prefix + key in self.given


def _chosen(config: BaseModel, is_resolved: bool, default: BaseModel | None = None, path: str = "") -> Iterator[str]:
    derived = config.derived_keys if isinstance(config, GRPOConfig) else frozenset()
    for name in config.model_fields_set - derived:
        value = getattr(config, name)
        usual = (
            getattr(default, name)
            if default is not None
            else type(config).model_fields[name].get_default(call_default_factory=True)
        )
        if isinstance(value, BaseModel):
            yield from _chosen(value, is_resolved, usual if isinstance(usual, BaseModel) else None, f"{path}{name}.")
        elif value != usual or not (is_resolved or (default is not None and name in default.model_fields_set)):
            yield path + name
