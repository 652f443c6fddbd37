"""Ten kills: eight at moments and points that a seed draws, two of vLLM's runs; the benchmark does a hundred."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.draws import Kill, Pace
from tests.chaos.lives import Run
from tests.chaos.plan import Fault
from tests.chaos.rounds import SCENARIOS, SYNC, Round, draw_and_play, play_round
from tests.conftest import require
from tests.parts import missing_vllm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]

_SEED = 7
_NUM_KILLS = 8
_PACE = Pace(ready_s=6.0, wall_s=9.0)


def test_runs_that_are_killed_eight_times_equal_the_unbroken_one(tmp_path: Path, model: Path, unbroken: Run) -> None:
    """A run that reaches its end before all kills hit is followed by another."""
    rng = random.Random(_SEED)
    num_kills = number = 0
    while num_kills < _NUM_KILLS:
        run = Run(folder=tmp_path / str(number), model=model, config=SYNC.config())
        for played in play_to_end(run, rng, _NUM_KILLS - num_kills, unbroken):
            assert played.complaints == ()
            assert played.lost == 0
            num_kills += played.was_killed
        number += 1


def play_to_end(run: Run, rng: random.Random, num_kills: int, twin: Run) -> Iterator[Round]:
    """Rounds with up to `num_kills` kills, and at last one without, unless the run is over before."""
    is_over = False
    while not is_over:
        played = draw_and_play(run, rng, pace=_PACE, twin=twin) if num_kills else play_round(run, None, twin=twin)
        yield played
        is_over = played.is_over
        num_kills -= played.was_killed


def test_vllm_run_that_is_killed_twice_keeps_every_episode(tmp_path: Path, model: Path) -> None:
    require("vllm", missing_vllm())
    scenario = next(each for each in SCENARIOS if each.engine == "vllm" and each.max_lag == 2)
    run = Run(folder=tmp_path, model=model, config=scenario.config())
    kills = [
        Kill(whom="driver", fault=Fault(point="end", count=50)),
        Kill(whom="all", fault=Fault(point="learned", count=4, whom="all")),
        None,
    ]
    rounds = [play_round(run, kill) for kill in kills]
    assert [line for played in rounds for line in played.complaints] == []
    assert [played.was_killed for played in rounds] == [True, True, False]
    assert [played.lost for played in rounds] == [0, 0, 0]
    assert rounds[-1].step == run.config["steps"]
