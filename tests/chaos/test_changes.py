"""Runs that go on with another configuration, suite or place: what was done stays as it was done."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.envs import EnvSuite
from tests.chaos.audit import Snapshot, check, check_kept, take
from tests.chaos.draws import Kill
from tests.chaos.errand import ERRAND, STROLL, errands
from tests.chaos.lives import Life, Run
from tests.chaos.plan import Fault
from tests.chaos.rounds import SYNC
from tests.chaos.twins import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]

_SLOW, _FAST = {"learning_rate": 1e-4}, {"learning_rate": 2e-3}


def live(run: Run, fault: Fault | None = None) -> Life:
    life = run.live(Kill(whom="driver", fault=fault) if fault is not None else None)
    assert life.complaints == ()
    assert life.was_killed == (fault is not None)
    return life


def test_steps_made_before_a_change_are_made_again_as_they_were(tmp_path: Path, model: Path) -> None:
    """The twin changes its learning rate between two whole fits; the other run is killed on both sides of it, and moved
    with its model."""
    twin = Run(folder=tmp_path / "twin", model=model, config=SYNC.config(steps=3, learner=_SLOW))
    live(twin)
    twin.config = SYNC.config(steps=6, learner=_FAST)
    live(twin)
    run = Run(folder=tmp_path / "here", model=model, config=SYNC.config(steps=6, learner=_SLOW))
    live(run, Fault(point="train", count=3))
    run = move(run, tmp_path / "there")
    run.config = twin.config
    assert live(run, Fault(point="train", count=2)).notes == (
        "train.learner.learning_rate changed from 0.0001 to 0.002",
        "making steps 1 to 3 again from the ledger, on the model the run began with",
    )
    shutil.rmtree(run.run / "checkpoints")
    assert live(run).notes == ("making steps 1 to 5 again from the ledger, on the model the run began with",)
    assert differences(twin.run, run.run) == []


def move(run: Run, folder: Path) -> Run:
    shutil.copytree(run.model, folder / "model")
    run.run.rename(folder / "run")
    return replace(run, folder=folder, model=folder / "model")


def test_groups_in_hand_keep_their_size_and_suite(tmp_path: Path, model: Path) -> None:
    run = Run(folder=tmp_path, model=model, config=SYNC.config(steps=3))
    live(run, Fault(point="end", count=18))
    before = take(run.ledger)
    run.config = SYNC.config(steps=3, group_size=6)
    run.suite = {ERRAND: 1.0, STROLL: 1.0}
    refused = run.live()
    assert "allow it by name (--allow suite)" in refused.complaints[0]
    assert refused.ready_s is None
    run.allow = ("suite",)
    live(run)
    after = take(run.ledger)
    assert check_kept(before, after) == []
    assert after.last_step == 3
    for suite, size, numbers in (
        (errands(), 4, range(len(before.groups))),
        (EnvSuite(dict(run.suite)), 6, range(len(before.groups), len(after.groups))),
    ):
        half = Snapshot(groups={number: after.groups[number] for number in numbers})
        assert {group.size for group in half.groups.values()} == {size}
        assert [line for line in check(half, suite) if "another task" in line] == []
