"""The learner's process: one model, one optimiser, one call at a time.

Invariant: a step is made whole or not at all. Whatever is not finite (an advantage, a log-prob, the loss, the
gradient) refuses the step by name, and weights, optimiser and version stay as they were.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palaestra.errors import ConfigError, StepRefusedError
from palaestra.processes import Reply
from palaestra.trainer._fingerprint import fingerprints
from palaestra.trainer._learner_files import read_state, write_model, write_state, write_weights
from palaestra.trainer._policy_model import PolicyModel
from palaestra.trainer.batch import MicroBatch, TrainRow, check_rows, denominators, make_micro_batches, pack_by_length
from palaestra.trainer.learner import LearnerConfig, LearnerSetup, Published, StepReport
from palaestra.trainer.losses import LossResult, find_loss, log_linear_proximal, policy_loss
from palaestra.trainer.trace import StepTrace


def build(setup: LearnerSetup) -> LearnerService:
    """The service; raises `ConfigError` when the model or the loss does not load."""
    torch.set_num_threads(setup.config.threads)
    torch.manual_seed(setup.config.seed)
    try:
        importlib.import_module(setup.loss_module)
    except ImportError as error:
        raise ConfigError(f"the learner cannot import the loss's module {setup.loss_module!r}: {error}") from error
    return LearnerService(PolicyModel(setup.model_path, setup.config), setup.config)


class LearnerService:
    """Answers every call at once; there is no background work."""

    def __init__(self, model: PolicyModel, config: LearnerConfig) -> None:
        self._model = model
        self._config = config
        self._parameters = model.parameters()
        self._optimizer = _make_optimizer(list(self._parameters.values()), config)
        self._version = 0
        self._num_updates = 0
        self._made_on = f"{model.describe_device()}, {config.threads} threads, torch {torch.__version__}"
        self._calls: dict[str, Callable[..., object]] = {
            "step": self.step,
            "publish": self.publish,
            "score": self.score,
            "save": self.save,
            "load": self.load,
            "export": self.export,
        }

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Run the method of that name."""
        reply.send(self._calls[method](*args))

    def work(self) -> bool:
        """Nothing to do between calls."""
        return False

    def close(self) -> None:
        """Nothing to release."""

    def step(self, rows: list[TrainRow]) -> StepReport:
        """Make all updates of one batch; raises `StepRefusedError` where they cannot be."""
        started = time.perf_counter()
        # one update writes only after everything was checked; with several, a later one can still fail
        before = self._state(is_copy=True) if self._updates_per_step > 1 else None
        totals = _Totals(tuple(self._parameters))
        try:
            check_rows(rows, self._model.vocab_size)
            for minibatch in self._minibatches(self._with_proximal(rows)):
                self._update(minibatch, totals)
        except (ValueError, FloatingPointError) as error:
            if before is not None:
                self._restore(before)
            raise StepRefusedError(f"step refused at version {self._version}, weights unchanged: {error}") from error
        self._version += 1
        seconds = time.perf_counter() - started
        return StepReport(
            metrics=totals.averages(), version=self._version, seconds=seconds, trace=totals.trace(self._made_on)
        )

    def publish(self, folder: Path) -> Published:
        """Write the weights for an engine."""
        return Published(version=self._version, checksum=write_weights(self._model.network, folder))

    def export(self, folder: Path) -> None:
        """Write a model folder."""
        write_model(self._model.network, self._model.folder, folder)

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        write_state(self._state(), folder)

    def load(self, folder: Path) -> int:
        """Read a checkpoint; the version it holds."""
        state = read_state(folder, self._model.device)
        expected = {name: parameter.shape for name, parameter in self._parameters.items()}
        if {name: tensor.shape for name, tensor in state["parameters"].items()} != expected:
            raise ConfigError(f"learner checkpoint {folder} is of another model than {self._model.folder}")
        self._restore(state)
        return self._version

    def score(self, sequences: list[list[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of all tokens but the first, at temperature 1."""
        lengths = [max(len(sequence) - 1, 0) for sequence in sequences]
        scores = [np.zeros(length, dtype=np.float32) for length in lengths]
        order = sorted((i for i in range(len(sequences)) if lengths[i]), key=lambda i: lengths[i])
        for part in pack_by_length(order, lengths, self._config.max_micro_batch_tokens):
            for index, score in zip(part, self._score([sequences[i] for i in part]), strict=True):
                scores[index] = score
        return scores

    @torch.no_grad()
    def _score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        lengths = [len(sequence) - 1 for sequence in sequences]
        ids_BP = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
        for ids_P, sequence in zip(ids_BP, sequences, strict=True):
            ids_P[: len(sequence) - 1] = sequence[:-1]
        row_N = np.repeat(np.arange(len(sequences)), lengths)
        position_N = np.concatenate([np.arange(length) for length in lengths])
        target_N = np.concatenate([np.asarray(sequence[1:], dtype=np.int64) for sequence in sequences])
        logprobs_N = self._model.logprobs(ids_BP, row_N, position_N, target_N, temperature=1.0)
        return np.split(logprobs_N.cpu().numpy(), np.cumsum(lengths)[:-1])

    @property
    def _updates_per_step(self) -> int:
        return self._config.num_minibatches * self._config.num_epochs

    def _minibatches(self, rows: Sequence[TrainRow]) -> Iterator[list[TrainRow]]:
        for epoch in range(self._config.num_epochs):
            # seeded by the version, so a resumed run deals as the unbroken one would have
            order = np.random.default_rng((self._config.seed, self._version, epoch)).permutation(len(rows))
            for part in np.array_split(order, self._config.num_minibatches):
                minibatch = [rows[index] for index in sorted(part)]
                if any(row.trajectory.num_sampled for row in minibatch):
                    yield minibatch

    def _micro_batches(self, rows: Sequence[TrainRow]) -> list[MicroBatch]:
        config = self._config
        denominator_R = denominators(rows, config.denominator, constant_length=config.constant_length)
        return make_micro_batches(rows, denominator_R, max_tokens=config.max_micro_batch_tokens)

    def _update(self, rows: Sequence[TrainRow], totals: _Totals) -> None:
        self._optimizer.zero_grad()
        loss = 0.0
        for micro_batch in self._micro_batches(rows):
            result = self._loss(micro_batch)
            value = float(result.loss.detach())
            if not np.isfinite(value):
                raise FloatingPointError(f"the loss is {value} on rows {micro_batch.index_B.tolist()} of the minibatch")
            result.loss.backward()  # type: ignore[no-untyped-call]
            totals.add_tokens(result.metrics, micro_batch.num_tokens)
            loss += value
        parameters = list(self._parameters.values())
        prints_P2 = fingerprints([parameter.grad for parameter in parameters])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm))
        if not np.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        rate = self._learning_rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._num_updates += 1
        totals.add_update({"loss": loss, "grad_norm": norm, "learning_rate": rate}, prints_P2)

    def _loss(self, micro_batch: MicroBatch) -> LossResult:
        policy_N = self._logprobs(micro_batch)
        tensor = self._model.tensor
        behaviour_N = tensor(micro_batch.behaviour_N)
        return policy_loss(
            policy_N,
            behaviour_N,
            tensor(micro_batch.advantage_N),
            torch.ones_like(policy_N, dtype=torch.bool),
            tensor(micro_batch.denominator_N),
            self._config.loss,
            proximal_logprobs=self._proximal(micro_batch, policy_N, behaviour_N),
            sequence=tensor(micro_batch.row_N),
        )

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        return self._model.logprobs(
            batch.ids_BP, batch.row_N, batch.position_N, batch.target_N, temperature=self._config.temperature
        )

    def _proximal(self, micro_batch: MicroBatch, policy_N: Tensor, behaviour_N: Tensor) -> Tensor:
        if self._config.loss.proximal == "log_linear":
            lag_N = self._model.tensor(np.maximum(self._version - micro_batch.version_N, 0))
            return log_linear_proximal(policy_N, behaviour_N, lag_N)
        if micro_batch.proximal_N is not None:
            return self._model.tensor(micro_batch.proximal_N)
        return policy_N.detach()

    @torch.no_grad()
    def _with_proximal(self, rows: Sequence[TrainRow]) -> Sequence[TrainRow]:
        """Rows with the present policy's log-probs, where the loss needs them and the step moves the policy."""
        loss = self._config.loss
        is_needed = find_loss(loss.name).needs_proximal and loss.proximal == "recompute"
        if not is_needed or self._updates_per_step == 1:
            return rows
        filled = list(rows)
        for batch in self._micro_batches(rows):
            logprobs_N = self._logprobs(batch).cpu().numpy()
            for row, index in enumerate(batch.index_B):
                trajectory = rows[index].trajectory
                proximal_T = np.zeros(len(trajectory), dtype=np.float32)
                proximal_T[trajectory.loss_mask] = logprobs_N[batch.row_N == row]
                filled[index] = replace(rows[index], proximal_T=proximal_T)
        return filled

    def _learning_rate(self) -> float:
        warmup = self._config.warmup_updates
        return self._config.learning_rate * min(1.0, (self._num_updates + 1) / max(warmup, 1))

    def _state(self, *, is_copy: bool = False) -> dict[str, Any]:
        copy = torch.clone if is_copy else lambda tensor: tensor
        moments = self._optimizer.state_dict()["state"]
        return {
            "version": self._version,
            "num_updates": self._num_updates,
            "parameters": {name: copy(parameter.detach()) for name, parameter in self._parameters.items()},
            "moments": {key: {n: copy(t) for n, t in moment.items()} for key, moment in moments.items()},
            "rng": torch.get_rng_state(),
        }

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(state["parameters"][name])
        groups = self._optimizer.state_dict()["param_groups"]  # the configuration's, not the checkpoint's
        self._optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
        torch.set_rng_state(state["rng"].cpu())
        self._version = int(state["version"])
        self._num_updates = int(state["num_updates"])


class _Totals:
    """Running averages of one step: metrics over its tokens, facts over its updates, maxima as maxima."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._updates: list[tuple[float, float, NDArray[np.int64]]] = []

    def add_tokens(self, metrics: dict[str, float], num_tokens: int) -> None:
        for name, value in metrics.items():
            if name.startswith("max_"):
                self._sums[name] = max(self._sums[name], value)
                self._counts[name] = 1
            else:
                self._add(name, value, num_tokens)

    def add_update(self, facts: dict[str, float], prints_P2: NDArray[np.int64]) -> None:
        for name, value in facts.items():
            self._add(name, value, 1)
        self._updates.append((facts["loss"], facts["grad_norm"], prints_P2))

    def averages(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def trace(self, made_on: str) -> StepTrace:
        losses, norms, prints = zip(*self._updates, strict=True)
        return StepTrace(
            names=self._names,
            losses=np.array(losses),
            grad_norms=np.array(norms),
            fingerprints=np.stack(prints),
            made_on=made_on,
        )

    def _add(self, name: str, value: float, count: int) -> None:
        self._sums[name] += value * count
        self._counts[name] += count


def _make_optimizer(parameters: Sequence[torch.nn.Parameter], config: LearnerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon)
