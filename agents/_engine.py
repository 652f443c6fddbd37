"""What samples tokens for a policy: token ids in; ids, log-probabilities and policy versions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from palaestra.config import Config


class Sampling(Config):
    """How tokens are drawn. Log-probabilities are always those of the distribution drawn from."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus, in (0, 1]; training needs 1."""
    max_tokens: int = 512
    """Most tokens of one assistant message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one request sampled: arrays of shape (N,), the stop token included when there was one.

    `versions[i]` is the policy version whose weights computed token i.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    stop_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Running totals since the engine started: tokens out, requests done, seconds spent computing."""

    tokens: int
    requests: int
    busy_s: float
    version: int


class Engine(Protocol):
    """Samples tokens with weights that can be replaced while requests run."""

    max_model_len: int
    """Most tokens of prompt and completion together."""

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        """Sample one completion; leaving the await cancels the request. Raises `PolicyError`/`WorkerError`."""

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probability of every token but the first given those before it, one (T-1,) array each."""

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        """Replace the weights between two tokens of running requests; later tokens carry `version`.

        `folder` holds a Hugging Face `model.safetensors`, whose SHA-256 must be `checksum` where that is given.
        Versions must rise.
        """

    async def stats(self) -> EngineStats:
        """Running totals."""

    async def aclose(self) -> None:
        """Stop the engine and its processes; idempotent."""
