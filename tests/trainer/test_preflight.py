"""Before the main job begins: every missing part, and a model that cannot be talked to, is one clear line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from palaestra.errors import ConfigError
from palaestra.trainer.quickstart import QuickstartConfig
from palaestra.trainer.quickstart import _preflight as preflight
from palaestra.trainer.quickstart._folder import RunFolder
from palaestra.trainer.tiny import make_tokenizer

DESK = {"weights": {"palaestra/ToolDesk-v0": 1.0}, "options": {}, "rl": {"engine": "transformers"}}


def check(folder: Path, **values: object) -> None:
    preflight.check_parts(QuickstartConfig.parse(DESK | values), RunFolder(folder))


def test_vllm_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(ConfigError, match=r"vLLM is not installed; install palaestra\[cpu\]"):
        check(tmp_path, rl={"engine": "vllm"})


def test_the_sandbox_that_is_asked_for_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(name: str) -> str:
        tried.append(name)
        return "no such daemon"

    monkeypatch.setattr(preflight, "check_backend", refuse)
    weights, code = {"palaestra/CodeRepair-v0": 1.0}, "palaestra/CodeRepair-v0"
    for options, name in (({}, "jail"), ({code: {"sandbox": "docker"}}, "docker")):
        with pytest.raises(ConfigError, match=f"sandbox '{name}' does not work: no such daemon"):
            check(tmp_path, weights=weights, options=options)
    assert tried == ["jail", "docker"]


def test_chromium_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALAESTRA_CHROMIUM", str(tmp_path / "no-chromium"))
    with pytest.raises(ConfigError, match="no-chromium is not an executable"):
        check(tmp_path, weights={"palaestra/MiniWoB-v0": 1.0})


def test_parts_that_no_environment_needs_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALAESTRA_CHROMIUM", str(tmp_path / "no-chromium"))
    check(tmp_path)


def test_a_model_without_a_chat_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="give its family"):
        check(tmp_path / "run", model=str(tmp_path / "model"))


def test_a_given_model_lies_in_the_run_folder_afterwards(tmp_path: Path) -> None:
    model = make_tokenizer(["a b c"], tmp_path / "model")
    (model / "config.json").write_text("{}")
    check(tmp_path / "run", model=str(model))
    shutil.rmtree(model)
    assert (tmp_path / "run" / "base" / "tokenizer.json").is_file()
