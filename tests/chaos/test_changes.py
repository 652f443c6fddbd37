"""Runs that go on with another configuration, suite or place: what was done stays as it was done."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.envs import EnvSuite
from tests.chaos.audit import Snapshot, check, check_kept, take
from tests.chaos.errand import ERRAND, STROLL, errands
from tests.chaos.lives import Life, Run
from tests.chaos.plan import Fault
from tests.chaos.rounds import SYNC
from tests.chaos.twins import differences

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]

_SLOW, _FAST = {"learning_rate": 1e-4}, {"learning_rate": 2e-3}


def live(run: Run, fault: Fault | None = None) -> Life:
    life = run.live(fault=fault)
    assert life.complaints == ()
    assert life.was_killed == (fault is not None)
    return life


def test_steps_made_before_a_change_are_made_again_as_they_were(tmp_path: Path, model: Path) -> None:
    """The twin changes its learning rate between two whole fits; the other run is killed on both sides of it."""
    twin = Run(folder=tmp_path / "twin", model=model, config=SYNC.config(steps=3, learner=_SLOW))
    live(twin)
    twin.config = SYNC.config(steps=6, learner=_FAST)
    live(twin)
    run = Run(folder=tmp_path / "run", model=model, config=SYNC.config(steps=6, learner=_SLOW))
    live(run, Fault(point="train", count=3))
    run.config = twin.config
    told = live(run, Fault(point="train", count=2)).notes
    assert told == (
        "train.learner.learning_rate changed from 0.0001 to 0.002",
        "making steps 1 to 3 again from the ledger, on the model the run began with",
    )
    shutil.rmtree(run.run / "checkpoints")
    assert live(run).notes == ("making steps 1 to 5 again from the ledger, on the model the run began with",)
    assert differences(twin.run, run.run) == []


def test_run_goes_on_in_another_place_with_another_size_and_suite(tmp_path: Path, model: Path) -> None:
    run = Run(folder=tmp_path / "here", model=model, config=SYNC.config(steps=4))
    live(run, Fault(point="end", count=18))
    before = take(run.ledger)
    moved = move(run, tmp_path / "there")
    live(moved, Fault(point="train", count=2))
    after = take(moved.ledger)
    assert check(after, errands()) + check_kept(before, after) == []
    assert sizes_of(after) == {4: len(before.groups), 6: len(after.groups) - len(before.groups)}
    assert len(after.groups) > len(before.groups)
    moved.suite = {ERRAND: 1.0, STROLL: 1.0}
    refused = moved.live()
    assert not refused.is_over
    assert "allow it by name (--allow suite)" in refused.complaints[0]
    assert refused.ready_s is None
    moved.allow = ("suite",)
    live(moved)
    last = take(moved.ledger)
    assert check_kept(after, last) == []
    assert last.last_step == 4
    check_suites(last, len(after.groups), moved)


def move(run: Run, folder: Path) -> Run:
    """The run and its model elsewhere, and larger groups from there on."""
    shutil.copytree(run.model, folder / "model")
    run.run.rename(folder / "run")
    return replace(run, folder=folder, model=folder / "model", config={**run.config, "group_size": 6})


def sizes_of(snapshot: Snapshot) -> Counter[int]:
    return Counter(group.size for group in snapshot.groups.values())


def check_suites(snapshot: Snapshot, num_before: int, run: Run) -> None:
    """Groups up to the change are of the old suite, later ones of the new."""
    halves = [(errands(), range(num_before)), (EnvSuite(dict(run.suite)), range(num_before, len(snapshot.groups)))]
    for suite, numbers in halves:
        half = Snapshot(groups={number: snapshot.groups[number] for number in numbers})
        assert [line for line in check(half, suite) if "another task" in line] == []
