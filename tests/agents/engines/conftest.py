"""Two tiny Qwen3 models with equal shapes and different weights, and their exact log-probabilities."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import require

VOCAB_SIZE = 128
MAX_MODEL_LEN = 512

Forward = Callable[[Sequence[int]], NDArray[np.float32]]


class TinyModel(NamedTuple):
    """A model folder, and a function from T ids to logits of shape (T, vocab), computed in this process."""

    folder: Path
    forward: Forward


def require_library(name: str) -> None:
    """Skip when `name` is not installed, or fail; see `tests.conftest.require`."""
    require(name, None if importlib.util.find_spec(name) else f"{name} is not installed")


def _make(folder: Path, seed: int) -> TinyModel:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU kernels take
        intermediate_size=128,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        initializer_range=0.15,  # far from uniform, so that a wrong cache or weight shows
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)

    def forward(ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].float().numpy()
        return logits

    return TinyModel(folder, forward)


@pytest.fixture(scope="session")
def model_a(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The model that engines start with."""
    require_library("transformers")
    return _make(tmp_path_factory.mktemp("model_a"), seed=0)


@pytest.fixture(scope="session")
def model_b(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Same shapes, other weights."""
    require_library("transformers")
    return _make(tmp_path_factory.mktemp("model_b"), seed=1)
