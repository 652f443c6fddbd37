"""The supervised stage: imitate demonstrations until a probe says that the model has learned the tools.

Runs in a process of its own through TRL's `SFTTrainer`. Invariants: the loss is that of reply tokens alone;
training ends at the probe's target, not at a step count, because copying appears as a sudden change whose
moment varies between seeds; the result says which limit ended it. The same job gives the same weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from palaestra.config import Config
from palaestra.errors import ConfigError
from palaestra.processes import WorkerProcess
from palaestra.types import Trajectory

_START_S = 180.0
_IMPORTS_AND_SAVING_S = 300.0


class SFTConfig(Config):
    """How a model is taught from demonstrations. The defaults suit a model of about a million parameters."""

    max_steps: int = Field(default=1500, ge=1)
    """Most optimiser steps."""
    max_seconds: float = Field(default=600.0, gt=0)
    """Most seconds of training, probes included."""
    batch_size: int = Field(default=32, ge=1)
    """Demonstrations in a step; they are chosen to be similarly long."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; `cosine` falls to zero at `max_steps`."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps in which the learning rate rises from zero."""
    beta2: float = Field(default=0.98, gt=0, lt=1)
    """AdamW's memory of squared gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's pull towards zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    average: float = Field(default=0.97, ge=0, lt=1)
    """Memory of the running average of the weights, which is what is probed and saved; 0 takes the last weights."""
    probe_every: int = Field(default=50, ge=1)
    """Steps between two probes."""
    probe_target: float = Field(default=0.98, gt=0, le=1)
    """Share of held-out expert messages that the model must predict without a wrong token, to stop."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the process."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the demonstrations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePoint:
    """One probe: whole messages right (teacher-forced, greedy) as a share, seconds since training began."""

    step: int
    accuracy: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTResult:
    """What training came to; `reason` is the limit that ended it."""

    steps: int
    seconds: float
    reason: Literal["probe_target", "max_steps", "max_seconds"]
    loss: float
    probes: tuple[ProbePoint, ...]

    @property
    def has_learned(self) -> bool:
        """Whether the probe's target was reached."""
        return self.reason == "probe_target"


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTJob:
    """Everything that the worker needs. `progress` is a JSONL file of step, loss, seconds and probes."""

    model: Path
    output: Path
    train: tuple[Trajectory, ...]
    probe: tuple[Trajectory, ...]
    config: SFTConfig
    progress: Path


async def run_sft(
    model: Path | str,
    output: Path,
    train: Sequence[Trajectory],
    probe: Sequence[Trajectory],
    config: SFTConfig | None = None,
    *,
    log_path: Path | None = None,
) -> SFTResult:
    """Teach `model` from `train`, probe it on the clean held-out demonstrations `probe`, save it to `output`.

    While it runs, `output/sft.jsonl` grows by a line for each logged step. Raises `ConfigError` when there is
    nothing to learn or to probe, `WorkerError` when the process dies or is late.
    """
    settings = config or SFTConfig()
    for name, trajectories in (("train", train), ("probe", probe)):
        if not any(trajectory.num_sampled for trajectory in trajectories):
            raise ConfigError(f"{name} has no reply token; give demonstrations with replies")
    if len(train) < settings.batch_size:
        raise ConfigError(f"{len(train)} demonstrations are fewer than batch_size {settings.batch_size}")
    await asyncio.to_thread(output.mkdir, parents=True, exist_ok=True)
    job = SFTJob(
        model=Path(model),
        output=output,
        train=tuple(train),
        probe=tuple(probe),
        config=settings,
        progress=output / "sft.jsonl",
    )
    worker = await WorkerProcess.start(
        "palaestra.trainer._sft_worker:build",
        job,
        name="sft worker",
        log_path=log_path or output / "sft.log",
        start_timeout_s=_START_S,
        env={"OMP_NUM_THREADS": str(settings.threads), "TOKENIZERS_PARALLELISM": "false"},
    )
    async with worker:
        result: SFTResult = await worker.call("train", timeout_s=settings.max_seconds + _IMPORTS_AND_SAVING_S)
    return result
