"""Child's side that all local engines share: dispatch of calls, requests in hand, running totals.

Invariant: each request is answered exactly once, by its last token or not at all when it was aborted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from palaestra.agents._engine import Completion, EngineStats
from palaestra.agents.engines._process import GenerateCall, WorkerSetup
from palaestra.processes import Reply

_SEED_MASK = (1 << 62) - 1


@dataclass(slots=True)
class Running:
    """One generate request: who waits for it and what it sampled so far."""

    call: GenerateCall
    reply: Reply
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def add(self, token: int, logprob: float, version: int) -> None:
        """Note one sampled token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)

    def completion(self, stop_reason: Literal["stop", "length"]) -> Completion:
        """What the caller gets."""
        return Completion(
            ids=np.array(self.ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            versions=np.array(self.versions, np.int32),
            stop_reason=stop_reason,
        )


class EngineService(ABC):
    """Answers the calls of `ProcessEngine`; subclasses compute in `work`."""

    def __init__(self, setup: WorkerSetup, vocab_size: int) -> None:
        self._config = setup.config
        self._version = setup.version
        self._vocab_size = vocab_size
        self._running: dict[int, Running] = {}
        self._busy_s = 0.0
        self._num_tokens = self._num_requests = 0

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Take one call."""
        match method:
            case "generate":
                running = Running(args[0], reply)
                self._begin(running)
                self._running[running.call.number] = running
            case "abort":
                if self._running.pop(args[0], None) is not None:
                    self._abort(args[0])
            case "score":
                self._score(args[0], reply)
            case "load_weights":
                folder, version, checksum = args
                self._load_weights(folder, checksum)
                self._version = version
                reply.send(None)
            case "stats":
                reply.send(self._stats())
            case "vocab_size":
                reply.send(self._vocab_size)
            case _:
                raise ValueError(f"unknown method {method!r}")

    @abstractmethod
    def work(self) -> bool:
        """One step of the model; False when there is nothing to compute."""

    @abstractmethod
    def close(self) -> None:
        """Release the device."""

    @abstractmethod
    def _begin(self, running: Running) -> None:
        """Queue a request; raising refuses it."""

    @abstractmethod
    def _abort(self, number: int) -> None:
        """Free what a request holds; it is no longer in `_running`."""

    @abstractmethod
    def _score(self, sequences: list[list[int]], reply: Reply) -> None:
        """Answer with one array of log-probabilities for each sequence, now or later."""

    @abstractmethod
    def _load_weights(self, folder: str, checksum: str | None) -> None:
        """Replace all weights in place, or raise with none replaced."""

    def _finish(self, number: int, stop_reason: Literal["stop", "length"]) -> None:
        running = self._running.pop(number)
        self._num_requests += 1
        running.reply.send(running.completion(stop_reason))

    def _seed_of(self, call: GenerateCall) -> int:
        # each request has a seed: with one generator for all a result would depend on its neighbours
        return call.seed if call.seed is not None else hash((self._config.seed, call.number)) & _SEED_MASK

    def _stats(self) -> EngineStats:
        return EngineStats(
            tokens=self._num_tokens, requests=self._num_requests, busy_s=self._busy_s, version=self._version
        )


def one_line(error: BaseException) -> str:
    """Class and text of a library's error, short enough for a message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
