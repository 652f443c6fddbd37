"""Parent's side of an engine that runs in a worker process of its own.

Invariants: a request is refused before it is sent when it cannot fit or names tokens that the model does
not have; a `generate` that is left early (cancelled, deadline) is aborted in the child; versions rise.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from palaestra.agents._engine import Completion, EngineStats, Sampling
from palaestra.agents.engines._config import EngineConfig
from palaestra.agents.engines._limits import check_model_path, fit_context
from palaestra.errors import ContextFullError, PolicyError
from palaestra.processes import WorkerProcess


class WorkerSetup(NamedTuple):
    """What the child is built from: a local folder or hub name, limits, and the version of those weights."""

    model_path: str
    config: EngineConfig
    version: int


class GenerateCall(NamedTuple):
    """One request on the wire; `number` is the parent's and names the request in an abort."""

    number: int
    prompt: list[int]
    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    seed: int | None


class ProcessEngine:
    """The `Engine` protocol over a worker process; subclasses name the service that runs there."""

    _name: ClassVar[str]
    _target: ClassVar[str]

    def __init__(self, worker: WorkerProcess, setup: WorkerSetup, vocab_size: int) -> None:
        self.max_model_len = setup.config.max_model_len
        self._worker = worker
        self._config = setup.config
        self._vocab_size = vocab_size
        self._version = setup.version
        self._loading = asyncio.Lock()
        self._numbers = itertools.count()

    @classmethod
    async def start(cls, model_path: str | Path, config: EngineConfig, *, log_path: Path, version: int = 0) -> Self:
        """Start the process and load the model, whose weights count as `version`.

        Raises `ConfigError` when the library is missing or the model does not load, `WorkerError` when the
        process dies or is late.
        """
        cls.check_machine()
        local_or_hub = check_model_path(model_path)
        config = await asyncio.to_thread(fit_context, config, local_or_hub)
        setup = WorkerSetup(local_or_hub, config, version)
        worker = await WorkerProcess.start(
            cls._target,
            setup,
            name=cls._name,
            log_path=log_path,
            start_timeout_s=config.start_timeout_s,
            env=cls._environment(setup),
        )
        try:
            vocab_size: int = await worker.call("vocab_size", timeout_s=config.call_timeout_s)
        except BaseException:
            await worker.aclose()
            raise
        return cls(worker, setup, vocab_size)

    @classmethod
    def check_machine(cls) -> None:
        """Raise `ConfigError` when this machine lacks what the engine needs."""
        raise NotImplementedError

    @classmethod
    def _environment(cls, setup: WorkerSetup) -> Mapping[str, str]:
        threads = str(setup.config.threads)
        offline = {"HF_HUB_OFFLINE": "1"} if Path(setup.model_path).is_dir() else {}
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **offline}

    @property
    def pid(self) -> int:
        """Process id of the engine's process."""
        return self._worker.pid

    async def watch(self) -> NoReturn:
        """Wait for the end of the process, which nobody asked for, and raise `WorkerError`."""
        await self._worker.watch()

    async def stacks(self) -> str:
        """Where the engine's process is, thread by thread; see `WorkerProcess.stacks`."""
        return await self._worker.stacks()

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        """Sample one completion; see `Engine.generate`.

        A completion that reaches `max_model_len` ends with `length`. Raises `ContextFullError` when the
        prompt leaves no room for a token. With temperature 0 log-probabilities are those at temperature 1.
        """
        self._check_ids(prompt)
        room = self.max_model_len - len(prompt)
        if room < 1:
            limit = self.max_model_len
            raise ContextFullError(f"prompt of {len(prompt)} tokens leaves no room in max_model_len {limit}")
        call = GenerateCall(
            number=next(self._numbers),
            prompt=list(prompt),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, room),
            stop_ids=tuple(stop_ids),
            seed=seed,
        )
        is_answered = False
        try:
            completion: Completion = await self._worker.call("generate", call, timeout_s=self._config.call_timeout_s)
            is_answered = True
        finally:
            if not is_answered:
                self._worker.notify("abort", call.number)
        return completion

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probabilities at temperature 1; see `Engine.score`. Do not load weights meanwhile."""
        for sequence in sequences:
            self._check_ids(sequence)
            if len(sequence) > self.max_model_len:
                raise PolicyError(f"cannot score {len(sequence)} tokens; max_model_len is {self.max_model_len}")
        wire = [list(sequence) for sequence in sequences]
        scores: list[NDArray[np.float32]] = await self._worker.call(
            "score", wire, timeout_s=self._config.call_timeout_s
        )
        return scores

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        """Replace the weights between two tokens of running requests; see `Engine.load_weights`.

        Running requests keep the attention cache that the old weights computed ("in flight"): their later
        tokens follow neither policy exactly, so train on their recorded log-probabilities. Requests that
        come after the load share no cache with earlier ones. Raises `PolicyError`, with the weights
        unchanged, when `version` does not rise, `folder` does not hold exactly this model's tensors, or its
        `model.safetensors` has another SHA-256 than `checksum`.
        """
        async with self._loading:
            if version <= self._version:
                raise PolicyError(f"weights of version {version} refused: version {self._version} is loaded")
            arguments = (str(folder), version, checksum)
            await self._worker.call("load_weights", *arguments, timeout_s=self._config.call_timeout_s)
            self._version = version

    async def stats(self) -> EngineStats:
        """Running totals; `busy_s` is time spent in model steps."""
        stats: EngineStats = await self._worker.call("stats", timeout_s=self._config.call_timeout_s)
        return stats

    async def aclose(self) -> None:
        """Stop the process; requests still waiting fail with `WorkerError`. Idempotent."""
        await self._worker.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise PolicyError("a prompt needs at least one token")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            bad = next(token for token in ids if not 0 <= token < self._vocab_size)
            raise PolicyError(f"token id {bad} is outside the model's vocabulary of {self._vocab_size}")
