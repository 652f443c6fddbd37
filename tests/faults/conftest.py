"""What the fault tests share: a model of some thousand weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from tests.faults.jobs import Job

SIZE = TinyModelConfig(start="random", hidden_size=32, num_layers=2, num_heads=1, ffn_size=64, max_positions=4096)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(["say user assistant one two three"] * 3, folder, vocab_size=400)
    return make_model(folder, SIZE)


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return Job(folder=tmp_path, model=model)
