"""The learner: holds the trained weights, steps them on a batch, publishes and saves them.

Invariants: a version is the number of steps made; a step that is refused leaves weights, optimiser and version as
they were; what is written to disk appears whole or not at all. The weights live in a process of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from palaestra.agents.engines import check_model_path
from palaestra.config import Config
from palaestra.errors import ConfigError
from palaestra.processes import WorkerProcess
from palaestra.trainer.batch import Denominator, TrainRow
from palaestra.trainer.losses import LossConfig, find_loss
from palaestra.trainer.trace import StepTrace

_TARGET = "palaestra.trainer._learner_worker:build"


class LearnerConfig(Config):
    """Loss, optimiser and memory of the learner."""

    loss: LossConfig = LossConfig()
    """The loss and its parameters."""
    denominator: Denominator = "tokens"
    """What the summed loss of an update is divided by."""
    constant_length: int = Field(default=1024, ge=1)
    """Tokens per trajectory in the denominator `constant`."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """AdamW's step size after the warm-up. 1e-6 suits published models, 5e-4 a model of under a million parameters."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises linearly; it is constant afterwards."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the mean gradient."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """AdamW's decay of the squared gradient; below the usual 0.999 because a run has few updates."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's denominator offset."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; vectors (norms, biases) have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient is scaled down to this 2-norm."""
    num_minibatches: int = Field(default=1, ge=1)
    """Updates for each pass over a batch; its rows are dealt out at random."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over each batch."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the rollouts; the loss uses log-probs of logits / temperature."""
    max_micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens that go through the model at once; bounds memory, changes no result beyond rounding."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` takes a GPU when there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; weights are always float32. `auto` is bfloat16 on a GPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads; with 1 a run is reproducible bit for bit."""
    seed: int = Field(default=0, ge=0)
    """Seed of the learner's own randomness."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for the process and its model."""
    call_timeout_s: float = Field(default=3600.0, gt=0)
    """Longest wait for a step, or for files to be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step: averages over its tokens, the version it led to, its wall-clock seconds in the learner, its trace."""

    metrics: Mapping[str, float]
    version: int
    seconds: float
    trace: StepTrace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Weights on disk; `checksum` is the SHA-256 of `model.safetensors` in hexadecimal."""

    version: int
    checksum: str


class LearnerSetup(NamedTuple):
    """What the child is built from. `loss_module` registers the loss, which may be the user's own."""

    model_path: str
    config: LearnerConfig
    loss_module: str


class Learner(Protocol):
    """Whatever holds trained weights. Its methods are called one at a time."""

    @property
    def version(self) -> int:
        """Number of steps made, over all restarts."""

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        """Train on a batch. Raises `StepRefusedError`, with nothing changed, when a number in it is not finite."""

    async def publish(self, folder: Path) -> Published:
        """Write the weights and configuration that an engine loads; files already there are replaced."""

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of tokens 1..T-1 at temperature 1, as `Engine.score` gives them, shape (T-1,) each."""

    async def save(self, folder: Path) -> None:
        """Write everything that `load` needs to go on bit for bit."""

    async def load(self, folder: Path) -> None:
        """Go on from `save`. Raises `ConfigError`, with nothing changed, when the folder does not fit."""

    async def export(self, folder: Path) -> None:
        """Write a Hugging Face model folder with the tokenizer."""

    async def aclose(self) -> None:
        """Release everything; idempotent."""


class LocalLearner:
    """A learner in a worker process on this machine."""

    def __init__(self, worker: WorkerProcess, config: LearnerConfig) -> None:
        self._worker = worker
        self._timeout_s = config.call_timeout_s
        self._version = 0

    @classmethod
    async def start(cls, model_path: str | Path, config: LearnerConfig, log_path: Path) -> LocalLearner:
        """Start the process and load the model: a folder, or a hub name that is reachable or already fetched.

        Raises `ConfigError` when the model does not load, `WorkerError` when the process dies or is late.
        """
        local_or_hub = check_model_path(model_path)
        loss_module = find_loss(config.loss.name).function.__module__
        if loss_module == "__main__":
            raise ConfigError(f"loss {config.loss.name!r} is defined in a script; move it to a module, for the learner")
        threads = str(config.threads)
        worker = await WorkerProcess.start(
            _TARGET,
            LearnerSetup(local_or_hub, config, loss_module),
            name="learner",
            log_path=log_path,
            start_timeout_s=config.start_timeout_s,
            env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
        )
        return cls(worker, config)

    @property
    def version(self) -> int:
        """Number of steps made, over all restarts."""
        return self._version

    @property
    def pid(self) -> int:
        """Process id of the learner's process."""
        return self._worker.pid

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        """Train on a batch; see `Learner.step`. Left early (cancelled), the child still finishes the step."""
        report: StepReport = await self._worker.call("step", list(rows), timeout_s=self._timeout_s)
        self._version = report.version
        return report

    async def publish(self, folder: Path) -> Published:
        """Write weights and configuration for an engine; see `Learner.publish`."""
        published: Published = await self._worker.call("publish", folder, timeout_s=self._timeout_s)
        return published

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs at temperature 1; see `Learner.score`."""
        wire = [list(sequence) for sequence in sequences]
        scores: list[NDArray[np.float32]] = await self._worker.call("score", wire, timeout_s=self._timeout_s)
        return scores

    async def save(self, folder: Path) -> None:
        """Write a checkpoint; see `Learner.save`."""
        await self._worker.call("save", folder, timeout_s=self._timeout_s)

    async def load(self, folder: Path) -> None:
        """Go on from a checkpoint; see `Learner.load`."""
        self._version = await self._worker.call("load", folder, timeout_s=self._timeout_s)

    async def export(self, folder: Path) -> None:
        """Write a model folder; see `Learner.export`."""
        await self._worker.call("export", folder, timeout_s=self._timeout_s)

    async def watch(self) -> NoReturn:
        """Wait for the end of the process, which nobody asked for, and raise `WorkerError`."""
        await self._worker.watch()

    async def stacks(self) -> str:
        """Where the learner's process is, thread by thread; see `WorkerProcess.stacks`."""
        return await self._worker.stacks()

    async def aclose(self) -> None:
        """End the process. Idempotent."""
        await self._worker.aclose()

    async def __aenter__(self) -> LocalLearner:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
