"""A model is the same one wherever its folder lies; a run moved with its folder goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError
from palaestra.trainer import GRPOConfig, Trainer
from palaestra.trainer._model_identity import identity_of, place_of
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.replay import _recorded_model
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{}"),
        ("model.safetensors", b"weighty" * 10),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{}"),
        ("chat_template.jinja", b"{{ messages }}"),
    ],
)
def test_another_configuration_tokenizer_or_template_or_other_weights_are_another_model(
    model: Path, name: str, content: bytes
) -> None:
    (model / "tokenizer.json").write_bytes(b"[]" + bytes(2 << 20))
    before = identity_of(str(model))
    (model / "README.md").write_text("about it")
    assert identity_of(str(model)) == before
    (model / name).write_bytes(content)
    assert identity_of(str(model)) != before


def test_a_change_far_down_a_tokenizer_is_seen(model: Path) -> None:
    (model / "tokenizer.json").write_bytes(bytes(2 << 20) + b"a")
    before = identity_of(str(model))
    (model / "tokenizer.json").write_bytes(bytes(2 << 20) + b"b")
    assert identity_of(str(model)) != before


def test_a_run_names_its_model_so_that_it_is_found_from_any_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer("model", run=tmp_path / "run")._write_config(EnvSuite({"test/Echo-v0": 1.0}))
    monkeypatch.chdir("/")
    found = _recorded_model(tmp_path / "run")
    assert found == str(model)
    assert identity_of(found) == identity_of(str(model))
    assert place_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


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
