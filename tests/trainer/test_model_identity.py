"""A model is the same one wherever its folder lies; a run moved with its folder goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError
from palaestra.trainer import GRPOConfig, Trainer
from palaestra.trainer._model_identity import identity_of
from palaestra.trainer.learner import LocalLearner
from tests.toys import register_echo

register_echo()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights" * 10)
    return folder


def test_a_path_written_otherwise_or_moved_is_the_same_model(model: Path, tmp_path: Path) -> None:
    before = identity_of(str(model))
    assert identity_of(os.path.relpath(model)) == before
    assert identity_of(str(shutil.move(model, tmp_path / "elsewhere"))) == before


@pytest.mark.parametrize(("name", "content"), [("config.json", b"{}"), ("model.safetensors", b"weighty" * 10)])
def test_other_configuration_or_weights_are_another_model(model: Path, name: str, content: bytes) -> None:
    before = identity_of(str(model))
    (model / name).write_bytes(content)
    assert identity_of(str(model)) != before


def test_a_hub_name_is_its_own_identity_and_a_folder_needs_a_configuration(tmp_path: Path) -> None:
    assert identity_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError, match=r"no config\.json"):
        identity_of(str(tmp_path))


def test_a_model_without_a_chat_format_is_refused_before_anything_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("started")

    monkeypatch.setattr(LocalLearner, "start", fail)
    monkeypatch.setattr("palaestra.trainer.trainer.open_engine", fail)
    trainer = Trainer(model, GRPOConfig(engine="transformers"), run=tmp_path / "run")
    with pytest.raises(ConfigError, match="give its family"):
        trainer.fit(EnvSuite({"test/Echo-v0": 1.0}))
    assert not (tmp_path / "run").exists()
