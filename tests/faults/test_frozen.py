"""Frozen parts: a report says who waits for whom, a deadline ends the run by name, and what thaws goes on."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.jobs import Job, Running, check_plays, check_whole, last_step

ENGINE, LEARNER = "_transformers_worker", "_learner_worker"
_FOR_ROLLOUTS = "the learner waits for rollouts for "
_BY_NOW = "by now; who is where: "
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def report_of(running: Running, text: str, *, after: int = 0) -> str:
    """The report of a stall of which the run says `text`; several may be told, of which the first `after` are old."""
    lines = running.until(lambda: told(running, text)[after:], repr(text))
    return Path(lines[-1].rpartition(" ")[2]).read_text()


def told(running: Running, text: str) -> list[str]:
    return [line for line in running.errors().splitlines() if text in line]


def test_what_thaws_before_the_deadline_goes_on(job: Job) -> None:
    with job.start(steps=1000, stall_report_s=1.0) as running:
        running.until_step(1)
        engine = running.find(ENGINE)
        num_told = len(told(running, _BY_NOW))  # on a busy machine the start took that long too
        engine.suspend()
        report = report_of(running, _BY_NOW, after=num_told)
        assert "# Waits\nthe l" in report, "the learner or the loop waits"
        assert " wait in " in report, "where the tasks are"
        assert "transformers engine did not print its stacks within 2 s" in report
        assert 'File "' in report, "the learner's threads"
        engine.resume()
        running.until_step(last_step(job.run) + 2)

        num_told = len(told(running, _FOR_ROLLOUTS))
        job.paths.hang.touch()
        report = report_of(running, _FOR_ROLLOUTS, after=num_told)
        assert "Scene.begin" in report
        assert "episodes are running" in report
        assert report.count("most recent call first") >= 2, "of the learner and of the engine"
        job.paths.hang.unlink()
        running.until_step(last_step(job.run) + 2)

        job.paths.block.touch()
        report = report_of(running, "the event loop has not turned for ")
        assert "# Loop" in report
        assert "scene.py" in report
        assert "in begin" in report
        job.paths.block.unlink()
        running.until_step(last_step(job.run) + 2)
        running.send(signal.SIGINT)
        ended = running.wait()
    assert ended.code == 130
    assert set(check_plays(job.run)) <= {"scored", "truncated"}
    check_whole(job.run, steps=last_step(job.run))


def stop_at_deadline(job: Job, hit: str, **changes: object) -> str:
    with job.start(steps=1000, stall_report_s=1.0, **changes) as running:
        running.until_step(last_step(job.run) + 1)
        if hit == "hang":
            job.paths.hang.touch()
        else:
            running.find(hit).suspend()
        ended = running.wait(timeout_s=60)
    assert ended.code == 1, ended.text
    assert "Traceback" not in ended.text
    assert any("by now; who is where: " in line for line in ended.lines), ended.text
    return ended.lines[-1]


def test_what_does_not_thaw_ends_the_run_at_its_deadline_by_name(job: Job) -> None:
    line = stop_at_deadline(job, LEARNER, learner__call_timeout_s=5.0)
    assert line.startswith("palaestra: learner did not answer ")
    line = stop_at_deadline(job, ENGINE, engine_config__call_timeout_s=5.0)
    assert line.startswith("palaestra: transformers engine did not answer ")
    line = stop_at_deadline(job, "hang", step_timeout_s=6.0)
    assert line.startswith("palaestra: the learner waits for rollouts, and did so for 6 s: ")
    assert re.search(r"\d+ groups were dropped since the last step \(\d+ late\); ", line)
    assert "episode " in line
    assert "stacks: " in line
    job.paths.hang.unlink()
    steps = last_step(job.run) + 1
    ended = job.finish(steps=steps)
    assert ended.code == 0, ended.text
    check_plays(job.run)
    check_whole(job.run, steps=steps)


def test_an_environment_that_always_hangs_ends_the_run_by_name(job: Job) -> None:
    job.paths.hang.touch()
    ended = job.finish(group_timeout_s=0.2)
    assert ended.code == 1, ended.text
    assert "64 of the last 64 episodes got no advantage (64 late)" in ended.lines[-1]
    job.paths.hang.unlink()
    ended = job.finish()
    assert ended.code == 0, ended.text
    check_whole(job.run, steps=3)
    assert check_plays(job.run)["cancelled"] >= 64


def test_the_first_and_the_last_phase_are_watched_too(job: Job) -> None:
    job.paths.gate.write_text("export")
    with job.start(stall_report_s=1.0, steps=2) as running:
        running.until_told("the run waits for the learner to export the model for ")
        job.paths.open.touch()
        assert running.wait().code == 0
    job.paths.open.unlink()
    shutil.rmtree(job.run / "checkpoints")
    job.paths.gate.write_text("step")
    with job.start(stall_report_s=1.0) as running:
        running.until_told("the run waits to be at its last step again for ")
        running.until_told("gate: step")
        assert not any("_transformers_worker" in " ".join(each.cmdline()) for each in running.family())
        running.send(signal.SIGTERM)
        assert running.wait().code == 130
    job.paths.gate.write_text("publish")
    with job.start(stall_report_s=1.0) as running:
        running.until_told("the run waits for the engine to take the first weights for ")
        running.find(ENGINE).kill()  # nobody calls it now
        ended = running.wait()
    assert ended.code == 1
    assert ended.lines[-1].startswith("palaestra: transformers engine was killed by SIGKILL")
    reports = {path.name for path in (job.run / "logs").glob("stall-[0-9]*.txt")}
    assert len(reports) >= 2
    assert reports == {f"stall-{count + 1}.txt" for count in range(len(reports))}, "of both lives"
