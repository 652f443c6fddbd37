"""Components killed in the middle of a run: it goes on, or stops by name; no episode becomes a number by that."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from palaestra.sandboxes.leases import list_leases
from tests.conftest import require
from tests.faults.jobs import Job, Running, check_plays, check_whole, last_step, plays
from tests.parts import missing_bwrap, missing_chromium, missing_vllm

ENGINE, LEARNER = "_transformers_worker", "_learner_worker"
_SETTLED_S = 1.0
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
    with job.start(engine="vllm", engine_config__kv_cache_mb=64, steps=1000) as running:
        running.until_step(1)
        running.find("_vllm_worker").kill()
        ended = running.wait(timeout_s=60)
    assert ended.code == 1
    assert "palaestra: vllm engine was killed by SIGKILL" in ended.lines[-1]
    assert set(check_plays(job.run)) <= {"scored", "truncated"}


PARTS = {
    "palaestra/CodeRepair-v0": "palaestra.sandboxes._zygote",
    "palaestra/ToolDesk-v0": "palaestra.envs.desk._service",
    "palaestra/MiniWoB-v0": "--remote-debugging",
}


def test_parts_of_environments_are_started_anew(job: Job) -> None:
    require("bwrap", missing_bwrap())
    require("chromium", missing_chromium())
    job = replace(
        job,
        suite=dict.fromkeys(PARTS, 1.0),
        train={"engine_config.max_model_len": 2048, "max_failure_rate": 1.0, "max_invalid_rate": 1.0},
    )
    with job.start(steps=1000) as running:
        for env_id, word in PARTS.items():
            running.until(partial(has_played, job.run, env_id, "scored", "truncated"), f"a play of {env_id}")
            running.find(word)
            running.until(partial(kill_until_felt, running, word, env_id), f"a failure in {env_id}")
            running.until(partial(goes_on, job.run, env_id), f"{env_id} that goes on")
        running.until_step(last_step(job.run) + 2)
        running.send(signal.SIGINT)
        ended = running.wait()
        left = [lease for lease in list_leases() if lease.owner_pid == running.process.pid]
    assert ended.code == 130, ended.text
    assert left == []
    assert set(check_plays(job.run)) <= {"infra_error", "scored", "truncated"}, "nothing else is affected"
    check_whole(job.run, steps=last_step(job.run))


def kill_until_felt(running: Running, word: str, env_id: str) -> bool:
    """Kill the part as often as it takes to hit it while an episode uses it."""
    if has_played(running.job.run, env_id, "infra_error"):
        return True
    for member in running.family():
        with suppress(psutil.NoSuchProcess):
            if word in " ".join(member.cmdline()) and time.time() - member.create_time() > _SETTLED_S:
                member.kill()
    return False


def outcomes_of(run: Path, env_id: str) -> list[str]:
    return [play["outcome"] for play in plays(run) if play["task"]["env_id"] == env_id]


def has_played(run: Path, env_id: str, *outcomes: str) -> bool:
    return last_step(run) > 0 and not set(outcomes_of(run, env_id)).isdisjoint(outcomes)


def goes_on(run: Path, env_id: str) -> bool:
    return outcomes_of(run, env_id)[-1] in ("scored", "truncated")
