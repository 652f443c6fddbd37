"""`palaestra size` from the outside: with a real engine and learner, and what it says when it cannot measure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import save_file

from palaestra.trainer._proc import descendants
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from tests.toys import WORDS

ROOT = Path(__file__).parents[2]
PALAESTRA = Path(sys.executable).with_name("palaestra")
MODULE_OF_A_USER = "from tests.toys import register_echo\nregister_echo()\n"
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


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PALAESTRA, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_is_measured_proposed_trained_and_compared(folder: Path) -> None:
    make_small_model(folder / "model")
    done = run(folder, "size", "job.toml", "--seconds", "4", "--run", "runs/a", "--write", "new.toml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["measured"]["player"] == "model"
    assert [level["concurrency"] for level in found["measured"]["engine"]] == [1, 4, 8]
    assert found["predicted"]["proposed"]["step_s"] >= found["predicted"]["proposed"]["ideal_s"] > 0
    assert set(found["predicted"]["by_mode"]) == {"sync", "one-step", "async"}
    kept = json.loads((folder / "runs/a/size.json").read_text())
    assert [each["name"] for each in kept["predictions"]] == ["now", "proposed"]
    again = run(folder, "size", "job.toml", "--write", "new.toml")
    assert again.returncode == 2, "a file that is there is not replaced"
    trained = run(folder, "train", "new.toml", "--run", "runs/a", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["report"] == "runs/a/report.html"
    report = json.loads((folder / "runs/a/report.json").read_text())
    assert report["predicted"]["times"][0]["name"] == "whole step"
    assert all(row["measured_s"] >= 0 for row in report["predicted"]["times"])


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    make_small_model(folder / "model")
    command = [str(PALAESTRA), "size", "job.toml", "--seconds", "60"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        logs = wait_for(temporary, "palaestra-size-*/size-engine.log")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said == "palaestra: interrupted; nothing was kept\n"
    assert not logs.parent.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["job.toml", "model", "my_envs.py", "tmp"]


@pytest.mark.slow
def test_an_engine_that_dies_is_one_line_by_name(folder: Path) -> None:
    make_small_model(folder / "model")
    command = [str(PALAESTRA), "size", "job.toml", "--seconds", "60", "--json", "--run", "kept"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        os.kill(find_child(process.pid, "_transformers_worker:build"), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert len(said.splitlines()) == 1
    assert said.startswith("palaestra: transformers engine was killed by SIGKILL")
    assert "kept/logs/size-engine.log" in said
    assert not (folder / "kept" / "size.json").exists()


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


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_model_that_is_not_there_is_one_line(folder: Path) -> None:
    assert_one_line(run(folder, "size", "job.toml"), "model")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_a_model_that_does_not_load_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    (folder / "tmp").mkdir()
    make_small_model(folder / "model")
    save_file({}, folder / "model" / "model.safetensors")
    assert_one_line(run(folder, "size", "job.toml"), "model")
    assert list((folder / "tmp").glob("palaestra-size-*")) == []


@pytest.mark.slow
def test_an_environment_without_its_parts_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALAESTRA_CHROMIUM", str(folder / "no-chromium"))
    make_small_model(folder / "model")
    text = JOB.replace("test/Echo-v0", "palaestra/MiniWoB-v0")
    (folder / "job.toml").write_text(text)
    assert_one_line(run(folder, "size", "job.toml"), "no-chromium")


def test_a_file_that_is_there_is_not_replaced(folder: Path) -> None:
    assert_one_line(run(folder, "size", "job.toml", "--write", "job.toml"), "job.toml exists already")
