"""The main job's run folder: stages done once, settings fixed, evaluations kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from palaestra.agents import ExpertPolicy, evaluate
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError
from palaestra.trainer.progress import SilentDisplay
from palaestra.trainer.quickstart import QuickstartConfig, run_quickstart
from palaestra.trainer.quickstart._folder import RunFolder
from tests.toys import register_echo

register_echo()


def test_stage_is_done_only_when_it_ended_without_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RuntimeError), folder.record_stage("first"):
        raise RuntimeError("interrupted")
    assert folder.stage("first") is None
    with folder.record_stage("first") as note:
        note.text = "done"
    stage = folder.stage("first")
    assert stage is not None
    assert stage.note == "done"
    assert [stage.name for stage in folder.stages()] == ["first"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path).prepare({"seed": 1})
    RunFolder(tmp_path).prepare({"seed": 1})
    with pytest.raises(ConfigError, match="other settings"):
        RunFolder(tmp_path).prepare({"seed": 2})


def test_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the run folder"):
        RunFolder(tmp_path / "file" / "run").prepare({"seed": 1})


def test_evaluation_is_read_back_as_it_was(tmp_path: Path) -> None:
    report = evaluate(ExpertPolicy(skill=0.5), EnvSuite({"test/Echo-v0": 1.0}, active_split="test"), tasks=10)
    folder = RunFolder(tmp_path)
    folder.keep_evaluation("expert", report)
    assert folder.load_evaluation("expert", report.policy) == report


async def test_a_given_model_is_kept_so_that_it_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Prepared(Exception):
        """What comes afterwards is no matter here."""

    def prepare(folder: RunFolder, values: dict[str, object]) -> None:
        raise Prepared(values["model"])

    monkeypatch.setattr(RunFolder, "prepare", prepare)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    for given, kept in (("small", str(tmp_path / "small")), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")):
        with pytest.raises(Prepared, match=f"^{kept}$"):
            await run_quickstart(QuickstartConfig(model=given), tmp_path / "run", SilentDisplay())
