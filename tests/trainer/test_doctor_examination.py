"""The examination as a whole: one row for each check whatever breaks, by its deadline, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from palaestra.errors import ConfigError, WorkerError
from palaestra.trainer.doctor import Check, Verdict, examine
from palaestra.trainer.doctor import _environment_checks as environment_checks
from palaestra.trainer.doctor import _model_checks as model_checks
from palaestra.trainer.doctor import _probe as probe
from palaestra.trainer.doctor._check import Finding, ok
from palaestra.trainer.doctor._guard import MissingError, Part, guarded
from palaestra.trainer.doctor._marks import MARK
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.progress import SilentDisplay
from palaestra.trainer.tiny import make_tokenizer
from tests.toys import WORDS, ToyEngine, ToyLearner
from tests.trainer.doctor_jobs import ECHO, LEAKY, make_subject, path_for_children
from tests.trainer.test_doctor_memory import write_model

PALAESTRA = Path(sys.executable).with_name("palaestra")
OF_THE_MODEL = ["model", "engine", "learner", "template", "tool calls", "variance", "agreement", "memory"]
DESK = "palaestra/ToolDesk-v0"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", path_for_children())


@pytest.fixture
def model(tmp_path: Path) -> str:
    """What looks like a model until somebody loads it."""
    folder = make_tokenizer(["say said stop ok wrong", *WORDS] * 3, tmp_path / "model", vocab_size=512)
    return str(write_model(folder, {"embed.weight": [512, 64]}, max_position_embeddings=512))


def engine_that(monkeypatch: pytest.MonkeyPatch, outcome: Exception | ToyEngine) -> None:
    async def open_engine(*args: object, **kwargs: object) -> ToyEngine:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(model_checks, "open_engine", open_engine)


def learner_that(monkeypatch: pytest.MonkeyPatch, outcome: Exception | ToyLearner) -> None:
    async def start(*args: object) -> ToyLearner:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(LocalLearner, "start", start)


def mute_engine() -> ToyEngine:
    engine = ToyEngine(lambda prompt, seed: [9, 8])
    engine.version = 0
    return engine


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


async def test_dead_engine_hides_no_other_row(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that(monkeypatch, WorkerError("vllm was killed by SIGKILL"))
    learner_that(monkeypatch, ToyLearner())
    checks = await examine(make_subject(model, train={"concurrency": 4}), SilentDisplay())
    of_env = [f"{what} {ECHO}" for what in ("environment", "reward", "latency", "leaks")]
    assert [check.name for check in checks] == ["settings", *of_env, "environments", *OF_THE_MODEL]
    rows = by_name(checks)
    assert rows["engine"].verdict is Verdict.FAILURE
    assert "WorkerError: vllm was killed by SIGKILL" in rows["engine"].detail
    assert rows["variance"].verdict is rows["agreement"].verdict is Verdict.SKIPPED
    assert "needs the engine" in rows["agreement"].detail
    others = set(rows) - {"engine", "variance", "agreement", "settings"}
    assert {rows[name].verdict for name in others} == {Verdict.OK}, [rows[name] for name in others]


@pytest.mark.slow
@pytest.mark.parametrize(("leak", "words"), [("crash", "ended with 3"), ("blocking", "doctor_jobs.py")])
async def test_broken_environment_is_its_own_rows(
    model: str, monkeypatch: pytest.MonkeyPatch, leak: str, words: str
) -> None:
    """Here its first episode would end this process, or hold it for ever."""
    monkeypatch.setattr(environment_checks, "_EXPERT_S", 8.0)
    monkeypatch.setattr(probe, "_LATE_S", 0.0)
    engine_that(monkeypatch, mute_engine())
    learner_that(monkeypatch, ToyLearner())
    suite = {"options": {LEAKY: {"leak": leak}}}
    subject = make_subject(model, weights={ECHO: 1.0, LEAKY: 1.0}, suite=suite, train={"concurrency": 4})
    rows = by_name(await examine(subject, SilentDisplay()))
    assert rows[f"environment {LEAKY}"].verdict is Verdict.FAILURE
    assert words in rows[f"environment {LEAKY}"].detail
    assert rows[f"environment {LEAKY}"].remedy
    assert rows["variance"].verdict is Verdict.SKIPPED
    assert rows["variance"].detail == f"needs environment {LEAKY}, which could not be played"
    for what in ("reward", "latency", "leaks"):
        assert rows[f"{what} {LEAKY}"].verdict is Verdict.SKIPPED
        assert rows[f"{what} {ECHO}"].verdict is Verdict.OK
    assert rows["engine"].verdict is rows["template"].verdict is Verdict.OK


@pytest.mark.slow
async def test_environment_that_breaks_only_under_the_model_is_a_row(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_that(monkeypatch, mute_engine())
    learner_that(monkeypatch, ToyLearner())
    suite = {"options": {LEAKY: {"leak": "crash unsaid"}}}
    subject = make_subject(model, weights={LEAKY: 1.0}, suite=suite, train={"concurrency": 4})
    rows = by_name(await examine(subject, SilentDisplay()))
    assert rows[f"environment {LEAKY}"].verdict is Verdict.OK
    assert rows["variance"].verdict is Verdict.FAILURE
    assert "the process of the environments ended with 3" in rows["variance"].detail
    assert rows["template"].verdict is Verdict.OK
    assert rows["memory"].verdict is Verdict.OK


@pytest.mark.slow
async def test_environments_with_faults_of_each_kind(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that(monkeypatch, ConfigError("no"))
    learner_that(monkeypatch, ConfigError("no"))
    suite = {"options": {LEAKY: {"leak": "files", "is_always_solved": True}}}
    rows = by_name(await examine(make_subject(model, weights={LEAKY: 1.0}, suite=suite), SilentDisplay()))
    assert rows[f"leaks {LEAKY}"].verdict is Verdict.FAILURE
    assert rows[f"reward {LEAKY}"].verdict is not Verdict.OK


async def test_environments_that_are_not_reached_in_time_are_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_that(monkeypatch, ConfigError("no"))
    learner_that(monkeypatch, ConfigError("no"))
    monkeypatch.setattr(environment_checks, "_ALL_S", 6.0)
    suite = {"options": {LEAKY: {"leak": "stuck"}}}
    subject = make_subject(model, weights={LEAKY: 1.0, ECHO: 1.0}, suite=suite, train={"concurrency": 4})
    checks = await examine(subject, SilentDisplay())
    rows = by_name(checks)
    assert len(rows) == len(checks) == 2 * 4 + 1 + 1 + len(OF_THE_MODEL)
    assert rows["environments"].verdict is Verdict.WARNING
    assert rows["environments"].detail == f"not reached in 6 s, wholly or in part: {LEAKY}, {ECHO}"
    assert rows[f"environment {ECHO}"].verdict is Verdict.SKIPPED
    assert "was not reached" in rows[f"environment {ECHO}"].detail
    assert rows[f"leaks {ECHO}"].verdict is Verdict.SKIPPED


async def test_model_that_is_not_there_leaves_the_environments_rows(tmp_path: Path) -> None:
    rows = by_name(await examine(make_subject(str(tmp_path / "none"), train={"concurrency": 2}), SilentDisplay()))
    assert rows["model"].verdict is Verdict.FAILURE
    assert rows["model"].detail == f"ConfigError: no such model folder: {tmp_path / 'none'}"
    assert rows["settings"].verdict is Verdict.OK, "a job is not blamed for a model that is not there"
    for name in ("engine", "learner", "template", "tool calls", "variance", "agreement", "memory"):
        assert rows[name].verdict is Verdict.SKIPPED, rows[name]
    assert rows[f"leaks {ECHO}"].verdict is Verdict.OK


async def test_run_folder_that_cannot_be_and_a_size_that_is_not_known_are_rows(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine_that(monkeypatch, ConfigError("no"))
    learner_that(monkeypatch, ConfigError("no"))
    rows = by_name(await examine(make_subject(model, run="r" * 300, train={"concurrency": 4}), SilentDisplay()))
    assert rows["memory"].verdict is Verdict.FAILURE
    assert "the run's folder cannot be rrr" in rows["memory"].detail
    (Path(model) / "model.safetensors").rename(Path(model) / "pytorch_model.bin")
    rows = by_name(await examine(make_subject(model, train={"concurrency": 4}), SilentDisplay()))
    assert rows["memory"].verdict is Verdict.WARNING
    assert rows["memory"].detail.startswith("size not known: ")


async def test_relative_folder_that_is_not_there_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: object) -> str:
        raise OSError("no such repository\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    rows = by_name(await examine(make_subject("models/smal", train={"concurrency": 2}), SilentDisplay()))
    assert "no model folder 'models/smal', nor a hub model that can be reached: no such repo" in rows["model"].detail
    assert "second line" not in rows["model"].detail
    assert rows["settings"].verdict is Verdict.OK
    assert {rows[name].verdict for name in ("engine", "learner", "template", "memory")} == {Verdict.SKIPPED}


@pytest.mark.slow
async def test_cancelled_examination_leaves_no_process_and_no_folder(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine_that(monkeypatch, ConfigError("no"))
    learner_that(monkeypatch, ToyLearner())
    subject = make_subject(model, weights={LEAKY: 1.0}, suite={"options": {LEAKY: {"leak": "orphans"}}})
    async with asyncio.timeout(60.0):
        examination = asyncio.create_task(examine(subject, SilentDisplay()))
        while not any(is_running(pid, "sleep") for pid in processes_with(f"{MARK}={tmp_path}")):
            assert not examination.done()
            await asyncio.sleep(0.02)
        examination.cancel()
        with pytest.raises(asyncio.CancelledError):
            await examination
    assert not list(tmp_path.glob("palaestra-doctor-*"))
    assert not processes_with(f"{MARK}={tmp_path}")


def is_running(pid: int, name: str) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == name
    except OSError:
        return False


def processes_with(words: str) -> list[int]:
    """Live processes with these words in their environment."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdecimal() and words.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 4])
async def test_rounds_find_leaks_and_judge_rewards_however_few_episodes_run_at_once(
    model: str, monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    """What leaks where an expert succeeds is seen only where each round has an expert's episode."""
    engine_that(monkeypatch, ConfigError("no"))
    learner_that(monkeypatch, ConfigError("no"))
    subject = make_subject(
        model,
        weights={LEAKY: 1.0},
        suite={"options": {LEAKY: {"leak": "success"}}},
        train={"concurrency": concurrency},
    )
    rows = by_name(await examine(subject, SilentDisplay()))
    assert rows[f"leaks {LEAKY}"].verdict is Verdict.FAILURE
    assert "open descriptors stay behind after 8 episodes" in rows[f"leaks {LEAKY}"].detail
    assert f"with {concurrency} at once" in rows[f"latency {LEAKY}"].detail
    assert ", 9 episodes)" in rows[f"reward {LEAKY}"].detail


async def test_check_that_hangs_fails_by_its_deadline() -> None:
    async def hang() -> Finding:
        await asyncio.Event().wait()
        return ok("never")

    check, is_measured = await guarded("slow", 0.05, hang)
    assert check.verdict is Verdict.FAILURE
    assert "did not end within 0.05 s" in check.detail
    assert not is_measured


async def test_timeout_of_something_below_is_told_as_itself() -> None:
    async def late() -> Finding:
        raise TimeoutError("the database is away")

    check, _ = await guarded("below", 5.0, late)
    assert "TimeoutError: the database is away" in check.detail


async def test_group_of_errors_is_told_by_its_first() -> None:
    async def break_twice() -> Finding:
        raise ExceptionGroup("two", [WorkerError("engine\ndied"), ValueError("later")])

    check, _ = await guarded("broken", 5.0, break_twice)
    assert check.detail == "WorkerError: engine died"
    assert check.to_json()["verdict"] == "failure"


async def test_error_that_is_not_ours_says_where_to_look() -> None:
    async def divide() -> Finding:
        return ok(str(1 // 0))

    check, _ = await guarded("broken", 5.0, divide)
    assert check.detail.startswith("ZeroDivisionError")
    assert "environment" in check.remedy


async def test_part_that_failed_skips_whoever_needs_it() -> None:
    part: Part[int] = Part("the engine")
    part.settle(None)
    part.give_up()
    with pytest.raises(MissingError, match="needs the engine"):
        await part.get()
    there: Part[int] = Part("the learner")
    there.settle(3)
    there.give_up()
    assert await there.get() == 3


# The command, whole.


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small job in real parts: ToolDesk, a made model, the Transformers engine."""
    from palaestra.envs import EnvSuite
    from palaestra.trainer.demonstrations import collect, texts_of
    from palaestra.trainer.tiny import make_model

    folder = tmp_path_factory.mktemp("job")
    suite = EnvSuite({DESK: 1.0}, form="compact")
    texts = texts_of(asyncio.run(collect(suite, 30, skill=1.0, seed=0)))
    make_tokenizer(texts, folder / "model")
    make_model(folder / "model")
    path = folder / "job.toml"
    path.write_text(
        f'model = "{folder / "model"}"\n[suite]\nform = "compact"\nweights = {{ "{DESK}" = 1.0 }}\n'
        '[train]\nengine = "transformers"\nsteps = 3\ngroup_size = 4\ngroups_per_step = 2\nconcurrency = 8\n'
        "[train.sampling]\nmax_tokens = 16\n[train.engine_config]\nmax_model_len = 512\nmax_num_seqs = 8\n"
    )
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PALAESTRA, "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_doctor_runs_every_check_of_a_small_job(job: Path) -> None:
    done = run(str(job), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"]
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in answer["checks"]}
    assert len(rows) == 14
    assert "none of" in rows["settings"]["detail"]
    assert "16 episodes of its expert" in rows[f"environment {DESK}"]["detail"]
    assert "100% solved" in rows[f"reward {DESK}"]["detail"]
    assert "median / 90 %: reset" in rows[f"latency {DESK}"]["detail"]
    assert "nothing stays behind after 24 episodes (12 scored" in rows[f"leaks {DESK}"]["detail"]
    assert "stop tokens" in rows["model"]["detail"]
    assert "contexts of 512 tokens" in rows["engine"]["detail"]
    assert "loaded" in rows["learner"]["detail"]
    assert "only append" in rows["template"]["detail"]
    assert "come back as they were" in rows["tool calls"]["detail"]
    assert rows["variance"]["verdict"] == "warning"  # random weights solve nothing
    assert "GRPO does not move" in rows["variance"]["detail"]
    assert "sampled tokens" in rows["agreement"]["detail"]
    assert "learner's weights" in rows["memory"]["detail"]
    well = set(rows) - {"variance"}
    assert {rows[name]["verdict"] for name in well} == {"ok"}
    assert all(row["remedy"] for row in rows.values() if row["verdict"] != "ok")


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_nothing(job: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [str(PALAESTRA), "doctor", str(job), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        ends_s = time.monotonic() + 60
        while not list(tmp_path.glob("palaestra-doctor-*/learner.log")):
            assert process.poll() is None
            assert time.monotonic() < ends_s
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines() == ["palaestra: interrupted; nothing is left running"]
    assert not list(tmp_path.glob("palaestra-doctor-*"))
    assert not processes_with(f"TMPDIR={tmp_path}")
