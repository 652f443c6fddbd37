"""Components killed in the middle of a run: it goes on, or stops by name; no episode becomes a number by that."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from palaestra.sandboxes.leases import list_leases
from tests.conftest import require
from tests.faults.jobs import Job, Running, check_plays, check_whole, last_step, plays
from tests.parts import missing_bwrap, missing_chromium, missing_vllm

ENGINE, LEARNER = "_transformers_worker", "_learner_worker"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def kill_after_a_step(job: Job, *words: str) -> str:
    """Kill one of the run's own processes; the one line with which it stopped."""
    with job.start(steps=1000) as running:
        running.until_step(last_step(job.run) + 1)
        running.find(*words).kill()
        ended = running.wait(timeout_s=60)
    assert ended.code == 1, ended.text
    assert "Traceback" not in ended.text
    return ended.lines[-1]


def test_engine_and_learner_end_the_run_by_name_and_it_goes_on_with_the_same_command(job: Job) -> None:
    assert "palaestra: transformers engine was killed by SIGKILL" in kill_after_a_step(job, ENGINE)
    assert "palaestra: learner was killed by SIGKILL" in kill_after_a_step(job, LEARNER)
    check_plays(job.run)
    steps = last_step(job.run) + 1
    ended = job.finish(steps=steps)
    assert ended.code == 0, ended.text
    check_whole(job.run, steps=steps)
    assert set(check_plays(job.run)) <= {"scored", "truncated"}, "what was cut off was played anew"


def test_vllm_ends_the_run_by_name(job: Job) -> None:
    require("vllm", missing_vllm())
    with job.start(engine="vllm") as running:
        running.find("_vllm_worker").kill()
        ended = running.wait(timeout_s=60)
    assert ended.code == 1
    assert "palaestra: vllm engine was killed by SIGKILL" in ended.lines[-1]


def of_the_run(running: Running, name: str) -> Callable[[], bool]:
    """Ends the process of a leased part of the run, if there is one now."""

    def end() -> bool:
        family = {member.pid for member in running.family()}
        for member in running.family():
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(member.cmdline()) and member.pid in family:
                    member.send_signal(signal.SIGKILL)
                    return True
        return False

    return end


@pytest.mark.parametrize(
    ("env_id", "options", "word"),
    [
        ("palaestra/CodeRepair-v0", {"sandbox": "jail"}, "palaestra.sandboxes._zygote"),
        ("palaestra/ToolDesk-v0", {}, "palaestra.envs.desk._service"),
        ("palaestra/MiniWoB-v0", {}, "--type=renderer"),
        ("palaestra/MiniWoB-v0", {}, "--remote-debugging"),
    ],
    ids=["zygote", "desk", "renderer", "chromium"],
)
def test_a_part_of_an_environment_is_started_anew(job: Job, env_id: str, options: dict[str, object], word: str) -> None:
    require("bwrap", missing_bwrap())
    require("chromium", missing_chromium())
    job = Job(
        folder=job.folder,
        model=job.model,
        suite={env_id: 1.0},
        options={env_id: options} if options else {},
        train={"engine_config.max_model_len": 4096, "max_failure_rate": 1.0, "max_invalid_rate": 1.0},
    )
    with job.start(steps=1000) as running:
        running.until_step(1)
        running.until(of_the_run(running, word), word)
        running.until(lambda: has_failed(job.run), "an episode that failed")
        running.until_step(last_step(job.run) + 2)
        running.send(signal.SIGINT)
        ended = running.wait()
        left = [lease for lease in list_leases() if lease.owner_pid == running.process.pid]
    assert ended.code == 130, ended.text
    assert left == []
    counts = check_plays(job.run)
    assert counts["infra_error"] >= 1
    assert set(counts) <= {"infra_error", "scored", "truncated"}, "nothing else is affected"
    check_whole(job.run, steps=last_step(job.run))


def has_failed(run: Path) -> bool:
    return any(play["outcome"] == "infra_error" for play in plays(run))
