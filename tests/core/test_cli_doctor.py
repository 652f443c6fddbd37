"""`palaestra doctor CONFIG`: which job a file, a folder or a word names, and what was chosen in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from palaestra.cli._doctor_job import load_subject, show_checks
from palaestra.cli._main import app
from palaestra.errors import ConfigError
from palaestra.trainer.doctor import Check, Verdict
from palaestra.trainer.doctor._subject import NewModel

DESK = "palaestra/ToolDesk-v0"
JOB = f'model = "small"\n[suite.weights]\n"{DESK}" = 1.0\n[train]\nsteps = 7\n'


def test_training_job(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    subject = load_subject(str(path), ["train.group_size=4"], ())
    assert subject.model == "small"
    assert (subject.train.steps, subject.train.group_size, subject.prefix) == (7, 4, "train.")
    assert {key for key in subject.given if key.startswith("train.")} == {"train.steps", "train.group_size"}


def test_the_word_names_the_main_job() -> None:
    subject = load_subject("quickstart", ["rl.steps=7"], ())
    assert isinstance(subject.model, NewModel)
    assert (subject.train.steps, subject.train.concurrency, subject.prefix) == (7, 64, "rl.")
    assert subject.given == {"rl.steps"}


def test_file_of_the_main_job_is_known_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "main.toml"
    path.write_text("num_demonstrations = 300\n[rl]\nsteps = 7\n")
    subject = load_subject(str(path), (), ())
    assert isinstance(subject.model, NewModel)
    assert subject.given == {"num_demonstrations", "rl.steps"}


def test_given_model_of_the_main_job_brings_settings_that_nobody_chose() -> None:
    subject = load_subject("quickstart", ["model=small"], ())
    assert subject.model == "small"
    assert subject.train.engine_config.max_model_len == 8192
    assert subject.given == {"model"}


def test_run_folder_of_train_counts_only_what_was_changed(tmp_path: Path) -> None:
    from palaestra.trainer.job import Job

    job = Job.parse({"model": "small", "suite": {"weights": {DESK: 1.0}}, "train": {"steps": 7}})
    suite = job.suite.build().describe()
    record = {"model": job.model, "suite": suite, "train": job.train.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(record))
    subject = load_subject(str(tmp_path), (), ())
    assert subject.train == job.train
    assert {key for key in subject.given if key.startswith("train.")} == {"train.steps"}


def test_run_folder_of_the_main_job(tmp_path: Path) -> None:
    from palaestra.trainer.quickstart import QuickstartConfig

    config = QuickstartConfig.parse({"rl": {"steps": 7}})
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    subject = load_subject(str(tmp_path), (), ())
    assert isinstance(subject.model, NewModel)
    assert subject.given == {"rl.steps"}


@pytest.mark.parametrize(
    ("text", "words"), [(None, "is no run folder"), ("{", "cannot read"), ("[]", "no JSON object")]
)
def test_folder_that_is_no_run(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_subject(str(tmp_path), (), ())


def test_model_folder_is_told_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ConfigError, match="is a model folder, not a job: name it in a TOML file") as caught:
        load_subject(str(tmp_path), (), ())
    assert f"palaestra doctor quickstart --set model={tmp_path}" in str(caught.value)


def test_mistakes_are_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(JOB + "stepz = 3\n")
    with pytest.raises(ConfigError, match=r"job\.toml: unknown key 'train\.stepz'"):
        load_subject(str(path), (), ())
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_subject(str(tmp_path / "none.toml"), (), ())


CHECKS = [
    Check(name="settings", verdict=Verdict.OK, detail="none of 26 rules applies", seconds=0.1),
    Check(
        name=f"environment {DESK}",
        verdict=Verdict.FAILURE,
        detail="16 of 16 episodes failed: " + "no box to be had " * 20,
        remedy="mend what it names",
        seconds=12.34,
    ),
]


def test_piped_rows_are_lines_without_padding(capsys: pytest.CaptureFixture[str]) -> None:
    show_checks(CHECKS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "settings                           ok       0.1   none of 26 rules applies"
    assert lines[2].startswith("environment palaestra/ToolDesk-v0  FAILURE  12.3  16 of 16 episodes failed: no box")
    assert lines[2].endswith("no box to be had")
    assert lines[3:] == [f"environment {DESK}: mend what it names", "1 failure, 0 warnings"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_terminal_folds_the_prose_alone(capsys: pytest.CaptureFixture[str], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", str(width))
        show_checks(CHECKS)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    lines = lines[:-2]  # remedies and counts follow
    assert all(len(line) <= width for line in lines)
    assert sum(f"environment {DESK}" in line for line in lines) == 1
    assert sum("FAILURE" in line and "12.3" in line for line in lines) == 1
    assert sum("no box" in line for line in lines) > 2, "the prose is folded"


def test_flags_of_a_job_without_a_job_are_refused() -> None:
    done = CliRunner().invoke(app, ["doctor", "--set", "train.steps=3"])
    assert isinstance(done.exception, ConfigError)
    assert "palaestra doctor CONFIG" in str(done.exception)
