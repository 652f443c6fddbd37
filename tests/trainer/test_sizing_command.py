"""`palaestra size` from the outside: with a real engine and learner, and what it says when it cannot measure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import save_file

from palaestra.cli._options import load_job
from palaestra.trainer._proc import descendants
from palaestra.trainer.sizing import chosen_values
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from tests.commands import PALAESTRA, assert_one_line, run
from tests.toys import WORDS

ROOT = Path(__file__).parents[2]
MODULE_OF_A_USER = "from tests.toys import register_echo\nregister_echo()\n"
SIGNAL = """
import itertools, os
from tests.toys import Echo
count, begin = itertools.count(), Echo.begin
async def begin_or_end(self, task):
    if next(count) == 3:
        os.kill(os.getpid(), {number})
    return await begin(self, task)
Echo.begin = begin_or_end
"""
JOB = """
model = "model"
imports = ["my_envs"]
[suite]
form = "compact"
weights = { "test/Echo-v0" = 1.0 }
[train]
steps = 3
group_size = 2
groups_per_step = 2
concurrency = 4
engine = "transformers"
[train.engine_config]
max_model_len = 256
max_num_seqs = 8
[train.sampling]
max_tokens = 8
[train.learner]
max_micro_batch_tokens = 256
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job, a small random model and a module that registers a toy environment."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    (tmp_path / "my_envs.py").write_text(MODULE_OF_A_USER)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


def make_small_model(folder: Path) -> None:
    make_tokenizer(["say said stop ok wrong", *WORDS] * 3, folder, vocab_size=512)
    make_model(folder, TinyModelConfig(num_layers=2, ffn_size=64, max_positions=256))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_is_measured_proposed_trained_and_compared(folder: Path) -> None:
    make_small_model(folder / "model")
    done = run("size", "job.toml", "--seconds", "8", "--run", "runs/a", "--write", "new.toml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["measured"]["player"] == "model"
    assert [level["concurrency"] for level in found["measured"]["engine"]] == [1, 4, 8]
    assert found["predicted"]["proposed"]["step_s"] >= found["predicted"]["proposed"]["ideal_s"] > 0
    assert set(found["predicted"]["by_mode"]) == {"one-step", "async"}, "sync has an engine that was not measured"
    assert any("--set train.mode=sync" in note for note in found["notes"])
    kept = json.loads((folder / "runs/a/size.json").read_text())
    assert [each["name"] for each in kept["predictions"]] == ["now", "proposed"]
    again = run("size", "job.toml", "--write", "new.toml", cwd=folder)
    assert again.returncode == 2, "a file that is there is not replaced"
    trained = run("train", "new.toml", "--run", "runs/a", "--json", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["report"] == "runs/a/report.html"
    report = json.loads((folder / "runs/a/report.json").read_text())
    assert report["predicted"]["times"][0]["name"] == "whole step"
    assert all(row["measured_s"] >= 0 for row in report["predicted"]["times"])
    examined = run("doctor", "new.toml", "--json", cwd=folder)
    settings = next(row for row in json.loads(examined.stdout)["checks"] if row["name"] == "settings")
    assert settings["verdict"] == "ok", settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "flags"),
    [
        (signal.SIGINT, "start", []),
        (signal.SIGTERM, "start", ["--run", "runs/new"]),
        (signal.SIGINT, "task", ["--run", "runs/new"]),
        (signal.SIGTERM, "task", []),
        (signal.SIGHUP, "task", []),
    ],
)
def test_signals_leave_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, moment: str, flags: list[str]
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    if moment == "task":
        (folder / "my_envs.py").write_text(MODULE_OF_A_USER + SIGNAL.format(number=number.value))
    monkeypatch.setenv("TMPDIR", str(temporary))
    make_small_model(folder / "model")
    command = [str(PALAESTRA), "size", "job.toml", "--seconds", "60", *flags]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        logs = wait_for(temporary, "palaestra-size-*/size-engine.log")
        if moment == "start":
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said == "palaestra: interrupted; nothing was kept\n"
    assert not logs.parent.exists()
    assert not list(Path("/dev/shm").glob(f"palaestra-weights-{process.pid}-*"))
    assert sorted(path.name for path in folder.iterdir()) == ["job.toml", "model", "my_envs.py", "tmp"]


@pytest.mark.slow
def test_an_engine_that_dies_is_one_line_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small_model(folder / "model")
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    (folder / "tmp").mkdir()
    command = [str(PALAESTRA), "size", "job.toml", "--seconds", "60", "--json", "--run", "kept"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        os.kill(find_child(process.pid, "_transformers_worker:build"), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert len(said.splitlines()) == 1
    assert said.startswith("palaestra: transformers engine was killed by SIGKILL")
    (log,) = re.findall(r"see (\S+/palaestra-size-\w+/size-engine\.log)", said)
    assert Path(log).is_file(), "an error names it, so it stays"
    assert not (folder / "kept").exists()


def find_child(parent: int, target: str) -> int:
    for _ in range(600):
        for pid in descendants(parent):
            with suppress(OSError):
                if target in Path("/proc", str(pid), "cmdline").read_text():
                    return pid
        time.sleep(0.1)
    raise AssertionError(f"no process below {parent} runs {target}")


def wait_for(folder: Path, pattern: str) -> Path:
    for _ in range(600):
        found = list(folder.glob(pattern))
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"{pattern} did not appear in {folder}")


def test_a_model_that_is_not_there_is_one_line(folder: Path) -> None:
    assert_one_line(run("size", "job.toml", cwd=folder), "model")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_a_model_that_does_not_load_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    (folder / "tmp").mkdir()
    make_small_model(folder / "model")
    save_file({}, folder / "model" / "model.safetensors")
    assert_one_line(run("size", "job.toml", cwd=folder), "model")
    assert list((folder / "tmp").glob("palaestra-size-*")) == []


@pytest.mark.slow
def test_an_environment_without_its_parts_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALAESTRA_CHROMIUM", str(folder / "no-chromium"))
    make_small_model(folder / "model")
    text = JOB.replace("test/Echo-v0", "palaestra/MiniWoB-v0")
    (folder / "job.toml").write_text(text)
    assert_one_line(run("size", "job.toml", cwd=folder), "no-chromium")


@pytest.mark.parametrize("flag", ["--write", "--run"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_starts(folder: Path, flag: str) -> None:
    make_small_model(folder / "model")
    assert_one_line(run("size", "job.toml", flag, "job.toml/new/place", cwd=folder), "job.toml/new/place", flag)


def test_modules_of_flags_are_modules_of_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "more_envs.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    for flags in (["more_envs"], ["more_envs", "my_envs"]):
        job = load_job(folder / "job.toml", (), flags)
        assert chosen_values(job)["imports"] == ["my_envs", "more_envs"], "so that the written job knows them"


def test_a_file_that_is_there_is_not_replaced(folder: Path) -> None:
    assert_one_line(run("size", "job.toml", "--write", "job.toml", cwd=folder), "job.toml exists already")
