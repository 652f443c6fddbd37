"""The main job in small, on all its real parts: every stage, an interruption, a run folder that holds everything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import require
from tests.parts import missing_bwrap, missing_chromium, missing_vllm

SMALL = """
num_demonstrations = 90
num_probe = 6
num_eval_tasks = 9
[sft]
max_steps = 30
probe_every = 15
[rl]
steps = 3
group_size = 4
groups_per_step = 3
[rl.sampling]
max_tokens = 24
[rl.engine_config]
max_model_len = 256
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    require("vllm", missing_vllm())
    require("bwrap", missing_bwrap())
    require("chromium", missing_chromium())
    (tmp_path / "small.toml").write_text(SMALL)
    palaestra = str(Path(sys.executable).with_name("palaestra"))
    return [palaestra, "quickstart", "--config", str(tmp_path / "small.toml"), "--run", str(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_job_in_small(command: list[str]) -> None:
    run = Path(command[-1])
    orphans_before = orphaned_weights()
    interrupt_after_imitation(command, run)
    go_on(command)
    check_folder(run)
    assert orphaned_weights() <= orphans_before
    do_again(command, run)
    refuse_other_settings(command)


def orphaned_weights() -> set[Path]:
    """Published weights whose run has ended; those of tests beside this one are in use."""
    folders = Path("/dev/shm").glob("palaestra-weights-*")
    return {folder for folder in folders if not psutil.pid_exists(int(folder.name.split("-")[2]))}


def interrupt_after_imitation(command: list[str], run: Path) -> None:
    """Ctrl-C leaves exit code 130, one line, and no process."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + 300
        while not (run / "stages" / "imitation.json").exists():
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        family = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=120)
    assert job.returncode == 130, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [process.name() for process in alive] == []


def go_on(command: list[str]) -> None:
    """The same command finishes the job."""
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["complete"]
    assert set(result["evaluations"]) == {"random", "sft", "sft-greedy", "rl", "rl-greedy", "expert"}
    assert result["evaluations"]["expert"]["success"]["rate"] == 1.0
    assert result["evaluations"]["rl"]["outcomes"].get("infra_error", 0) == 0


def check_folder(run: Path) -> None:
    """Everything that the report speaks of is there, and the model loads as any other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("report.html", "report.json", "config.json", "seed", "rl/ledger.sqlite", "episodes/train.jsonl"):
        assert (run / name).is_file(), name
    assert len(list((run / "plots").glob("*.png"))) == 7
    assert len((run / "episodes" / "test-rl.jsonl").read_text().splitlines()) == 9
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.num_parameters() > 100_000
    assert len(AutoTokenizer.from_pretrained(run / "model")) == model.config.vocab_size
    steps = json.loads((run / "steps.json").read_text())
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["canary"] < 1e-3 for step in steps)


def do_again(command: list[str], run: Path) -> None:
    """A finished job is not done again."""
    before = (run / "episodes" / "test-rl.jsonl").stat().st_mtime_ns
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (run / "episodes" / "test-rl.jsonl").stat().st_mtime_ns == before


def refuse_other_settings(command: list[str]) -> None:
    """A folder keeps the settings it was begun with."""
    done = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "begun with other settings" in done.stderr
