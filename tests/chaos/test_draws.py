"""Kills are drawn by a seed, suit what the run can reach, and their points are functions that exist."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.audit import Snapshot, StepRow
from tests.chaos.draws import MOMENT, TRAINING_MOMENT, Kill, Pace, draw_kill
from tests.chaos.faults import POINTS

_STEPS = 14


def draw(seed: int, run: Path, last_step: int) -> Kill:
    steps = {step: StepRow(1, (step,), {}, b"") for step in range(1, last_step + 1)}
    pace = Pace(ready_s=5.0, wall_s=9.0)
    return draw_kill(random.Random(seed), run, Snapshot(steps=steps), steps=_STEPS, pace=pace)


def names(run: Path, last_step: int) -> Counter[str]:
    return Counter(draw(seed, run, last_step).name for seed in range(600))


@pytest.mark.parametrize("name", POINTS)
def test_point_is_a_function_of_the_program(name: str) -> None:
    assert callable(getattr(POINTS[name].owner, POINTS[name].name))


def test_same_seed_draws_the_same_kill(tmp_path: Path) -> None:
    assert [draw(seed, tmp_path, 3) for seed in range(50)] == [draw(seed, tmp_path, 3) for seed in range(50)]


def test_moments_lie_within_a_life(tmp_path: Path) -> None:
    kills = [draw(seed, tmp_path, 3) for seed in range(600)]
    longest = {name: max(k.after_s or 0.0 for k in kills if k.name == name) for name in (MOMENT, TRAINING_MOMENT)}
    assert 8.0 < longest[MOMENT] <= 9.0
    assert 3.5 < longest[TRAINING_MOMENT] <= 4.0
    assert {kill.whom for kill in kills} == {"driver", "all"}


def test_every_point_is_drawn_at_some_state(tmp_path: Path) -> None:
    fresh = names(tmp_path, 0)
    assert fresh.keys().isdisjoint({"replaying", "replayed", "loaded", "exporting"})
    (tmp_path / "checkpoints" / "version-00000008").mkdir(parents=True)
    late = names(tmp_path, _STEPS - 2)
    assert fresh.keys() | late.keys() == {MOMENT, TRAINING_MOMENT, *POINTS}


def test_step_is_not_waited_for_that_the_run_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "version-00000013").mkdir(parents=True)
    faults = [draw(seed, tmp_path, _STEPS - 1).fault for seed in range(600)]
    assert {fault.count for fault in faults if fault is not None and fault.point == "train"} == {1}
