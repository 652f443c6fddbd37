"""What changed since a run was last there: allowed, told or refused by rule; and a clock that jumps changes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.trainer.tiny import make_model
from tests.faults.conftest import SIZE
from tests.faults.jobs import Job, check_plays, check_whole, last_step
from tests.faults.scene import OTHER, SCENE

_DAY_S = 86_400
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def refused(job: Job, *more: str) -> str:
    ended = job.finish(*more)
    assert ended.code == 1, ended.text
    (line,) = ended.lines
    return line


def test_a_run_goes_on_with_what_may_change_and_with_nothing_else(job: Job, tmp_path: Path) -> None:
    with job.start() as running:
        for days in (1, -1):
            running.until_step(last_step(job.run) + 1)
            job.paths.jump.write_text(str(days * _DAY_S))
        ended = running.wait()
    assert (ended.code, ended.lines) == (0, []), "a clock that jumps is not noticed"
    check_whole(job.run, steps=3)
    assert set(check_plays(job.run)) <= {"scored", "truncated"}, "no deadline passes by it"

    wider = replace(job, suite={SCENE: 1.0, OTHER: 1.0})
    line = refused(wider)
    assert f"this run was started with suite.weights.{OTHER} = None, not 1.0: to go on with the change" in line
    assert "(--allow suite)" in line
    other_model = tmp_path / "other"
    shutil.copytree(job.model, other_model)
    make_model(other_model, SIZE, seed=1)
    line = refused(replace(job, model=other_model))
    assert "this run was started with model = " in line
    assert "use another run folder, or the settings it was started with" in line
    line = refused(replace(job, train={"seed": 1}))
    assert "this run was started with seed = 0, not 1" in line

    moved = tmp_path / "moved"
    shutil.copytree(job.model, moved)
    changed = replace(wider, model=moved, train={"learner.threads": 2, "learner.device": "cpu", "concurrency": 3})
    ended = changed.finish("--allow", "suite", steps=4)
    assert ended.code == 0, ended.text
    assert sorted(ended.lines) == [
        f"palaestra: suite.weights.{OTHER} changed from None to 1.0",
        "palaestra: train.concurrency changed from 4 to 3",
        "palaestra: train.learner.device changed from 'auto' to 'cpu'",
        "palaestra: train.learner.threads changed from 1 to 2",
        "palaestra: train.steps changed from 3 to 4",
    ]
    check_whole(job.run, steps=4)
