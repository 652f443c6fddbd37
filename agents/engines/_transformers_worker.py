"""The child side of `TransformersEngine`: one model, one batch, one step at a time.

Invariants: weights change only between two steps, so the version that computed a token is exact; rows
join the batch as soon as there is room and leave it with their last token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from palaestra.agents.engines._decoding import Batch, Drawn, Row
from palaestra.agents.engines._process import WorkerSetup
from palaestra.agents.engines._service import EngineService, Running, one_line
from palaestra.agents.engines._weights import read_weights, stored_shapes
from palaestra.errors import ConfigError
from palaestra.processes import Reply

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(setup: WorkerSetup) -> TransformersService:
    """The service; raises `ConfigError` when the model does not load or is too short for the configuration."""
    torch.set_num_threads(setup.config.threads)
    torch.set_grad_enabled(False)
    device = _device(setup)
    name = setup.config.dtype
    dtype = _DTYPES[name] if name != "auto" else torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(setup.model_path, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConfigError(f"transformers cannot load {setup.model_path}: {one_line(error)}") from error
    except SafetensorError:
        stored_shapes(setup.model_path, is_tied=False)  # says which file it is
        raise
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", setup.config.max_model_len)
    if setup.config.max_model_len > limit:
        raise ConfigError(f"max_model_len {setup.config.max_model_len} exceeds the model's {limit} positions")
    return TransformersService(setup, model)


def _device(setup: WorkerSetup) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if setup.config.device == "gpu" and not has_gpu:
        raise ConfigError("device 'gpu' asked for, but torch sees none; set device = 'cpu' or install a CUDA build")
    return torch.device("cuda" if has_gpu and setup.config.device != "cpu" else "cpu")


class TransformersService(EngineService):
    """One `work` admits waiting requests, then gives every row one token."""

    def __init__(self, setup: WorkerSetup, model: Any) -> None:
        super().__init__(setup, model.config.get_text_config().vocab_size)
        self._model = model
        self._is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
        self._shapes = stored_shapes(setup.model_path, is_tied=self._is_tied)
        unknown = self._shapes.keys() - model.state_dict().keys()
        if unknown:
            raise ConfigError(f"transformers renames {min(unknown)} of {setup.model_path}; use the engine 'vllm'")
        self._is_alone = setup.config.batch_invariant == "always"
        self._batches: list[Batch] = [] if self._is_alone else [Batch(model)]
        self._waiting: deque[Running] = deque()

    def work(self) -> bool:
        """One step, while there are requests."""
        started = time.perf_counter()
        self._drop_aborted()
        if not self._num_rows and not self._waiting:
            return False
        for batch in self._batches:
            if batch.rows:
                self._take(batch.rows, batch.step())
        self._drop_aborted()
        room = self._config.max_num_seqs - self._num_rows
        admitted = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for part in [[running] for running in admitted] if self._is_alone else [admitted] if admitted else []:
            self._admit(part)
        self._drop_aborted()
        self._busy_s += time.perf_counter() - started
        return True

    def close(self) -> None:
        """Nothing to release: the process ends."""

    def _begin(self, running: Running) -> None:
        self._waiting.append(running)

    def _abort(self, number: int) -> None:
        self._waiting = deque(running for running in self._waiting if running.call.number != number)

    def _score(self, sequences: list[list[int]], reply: Reply) -> None:
        started = time.perf_counter()
        results: list[NDArray[np.float32]] = []
        count = 1 if self._is_alone else self._config.max_num_seqs
        for first in range(0, len(sequences), count):
            results += self._score_batch(sequences[first : first + count])
        self._busy_s += time.perf_counter() - started
        reply.send(results)

    def _score_batch(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        length = max(map(len, sequences))
        device = self._model.device
        # padded on the right: a causal model needs no mask there
        ids_BT = torch.tensor([[*s, *[0] * (length - len(s))] for s in sequences], device=device)
        logits_BTV = self._model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        logprobs_BT = logits_BTV.log_softmax(-1).gather(2, ids_BT[:, 1:, None])[:, :, 0].cpu().numpy()
        return [row[: len(s) - 1].copy() for row, s in zip(logprobs_BT, sequences, strict=True)]

    def _load_weights(self, folder: str, checksum: str | None) -> None:
        self._model.load_state_dict(
            read_weights(folder, self._shapes, is_tied=self._is_tied, checksum=checksum), strict=False
        )

    @property
    def _num_rows(self) -> int:
        return sum(len(batch.rows) for batch in self._batches)

    def _admit(self, admitted: Sequence[Running]) -> None:
        if self._is_alone:
            self._batches.append(Batch(self._model))
        batch = self._batches[-1]
        rows = [self._row(running) for running in admitted]
        self._take(rows, batch.extend(rows, [running.call.prompt for running in admitted]))

    def _row(self, running: Running) -> Row:
        call = running.call
        generator = torch.Generator(self._model.device).manual_seed(self._seed_of(call))
        return Row(call.number, call.temperature, call.top_p, generator)

    def _take(self, rows: Sequence[Row], drawn: Sequence[Drawn]) -> None:
        for row, (token, logprob) in zip(rows, drawn, strict=True):
            running = self._running[row.number]
            running.add(token, logprob, self._version)
            row.token = token
            self._num_tokens += 1
            if token in running.call.stop_ids:
                self._finish(row.number, "stop")
            elif len(running.ids) >= running.call.max_tokens:
                self._finish(row.number, "length")

    def _drop_aborted(self) -> None:
        """Drop rows whose request finished or was aborted."""
        for batch in self._batches:
            batch.keep([index for index, row in enumerate(batch.rows) if row.number in self._running])
        if self._is_alone:
            self._batches = [batch for batch in self._batches if batch.rows]
