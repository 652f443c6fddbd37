"""When the supervised stage has learned enough: a probe of whole messages, on averaged weights.

Invariants: what is probed is what is saved, the running average of the weights, because the last step's own
weights favour the batch that they have just seen; whatever ends training is preceded by a probe.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from palaestra.trainer.sft import ProbePoint, SFTConfig, SFTJob, SFTResult
from palaestra.types import Trajectory

_PROBE_BATCH = 64
_AVERAGE_WARMUP = 10

Reason: TypeAlias = Literal["probe_target", "max_steps", "max_seconds"]


class WeightAverage:
    """Exponential running average of a model's parameters; its memory grows with the steps up to `memory`."""

    def __init__(self, model: PreTrainedModel, memory: float) -> None:
        self._live = [parameter.data for parameter in model.parameters()]
        self._mean = [values.clone() for values in self._live]
        self._memory = memory
        self._steps = 0

    def update(self) -> None:
        """Take in the parameters after a step."""
        self._steps += 1
        memory = min(self._memory, self._steps / (self._steps + _AVERAGE_WARMUP))
        torch._foreach_lerp_(self._mean, self._live, 1 - memory)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average inside, its own parameters again after."""
        own = [values.clone() for values in self._live]
        self.apply()
        try:
            yield
        finally:
            torch._foreach_copy_(self._live, own)

    def apply(self) -> None:
        """Give the model the average."""
        torch._foreach_copy_(self._live, self._mean)


class ProbeGate(TrainerCallback):  # type: ignore[misc]
    """Probes the model, writes progress, and stops training at the target or the time limit."""

    def __init__(self, job: SFTJob) -> None:
        self._config: SFTConfig = job.config
        self._probe = job.probe
        self._progress = job.progress
        self._probes: list[ProbePoint] = []
        self._loss = math.nan
        self._started_s = time.monotonic()
        self._seconds = 0.0
        self._steps = 0
        self._reason: Reason = "max_steps"
        self._average: WeightAverage | None = None

    def result(self) -> SFTResult:
        """What training came to."""
        return SFTResult(
            steps=self._steps, seconds=self._seconds, reason=self._reason, loss=self._loss, probes=tuple(self._probes)
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
        """Start the clock, the average and the progress file."""
        self._average = WeightAverage(model, self._config.average)
        self._started_s = time.monotonic()
        self._progress.write_text("", encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
        """Probe when it is time, and decide whether to go on; what ends training is always probed."""
        assert self._average is not None
        self._average.update()
        self._steps = int(state.global_step)
        is_late = time.monotonic() - self._started_s >= self._config.max_seconds
        if is_late or self._steps % self._config.probe_every == 0 or self._steps == self._config.max_steps:
            with self._average.in_place():
                accuracy = self._take_probe(model)
            if accuracy >= self._config.probe_target:
                self._reason, control.should_training_stop = "probe_target", True
            elif is_late:
                self._reason, control.should_training_stop = "max_seconds", True
        self._seconds = time.monotonic() - self._started_s

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the average in the model, to be saved."""
        assert self._average is not None
        self._average.apply()

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep the mean loss since the last log."""
        if "loss" in logs:
            self._loss = float(logs["loss"])
            self._write(step=int(state.global_step), loss=self._loss)

    def _take_probe(self, model: PreTrainedModel) -> float:
        accuracy = message_accuracy(model, self._probe)
        self._probes.append(ProbePoint(step=self._steps, accuracy=accuracy, seconds=time.monotonic() - self._started_s))
        self._write(step=self._steps, probe=accuracy)
        return accuracy

    def _write(self, **values: float) -> None:
        line = json.dumps({**values, "seconds": round(time.monotonic() - self._started_s, 3)})
        with self._progress.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@torch.no_grad()
def message_accuracy(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> float:
    """Share of messages whose every token is the most likely one, given the true tokens before it."""
    was_training = model.training
    model.eval()
    verdicts: list[bool] = []
    ordered = sorted(trajectories, key=len)
    for start in range(0, len(ordered), _PROBE_BATCH):
        part = ordered[start : start + _PROBE_BATCH]
        predicted = _predict(model, part)
        for row, trajectory in zip(predicted, part, strict=True):
            is_right = row[: len(trajectory) - 1] == trajectory.ids[1:]
            turns = np.where(trajectory.loss_mask, trajectory.turns, -1)[1:]
            verdicts.extend(bool(is_right[turns == turn].all()) for turn in np.unique(turns[turns >= 0]))
    model.train(was_training)
    return float(np.mean(verdicts))


def _predict(model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> NDArray[np.int64]:
    ids = torch.zeros(len(trajectories), max(map(len, trajectories)), dtype=torch.long)
    for row, trajectory in enumerate(trajectories):
        ids[row, : len(trajectory)] = torch.from_numpy(trajectory.ids)
    # no attention mask: padding stands to the right, where causal attention does not look
    predicted: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits.argmax(-1)
    return cast("NDArray[np.int64]", predicted.cpu().numpy())
