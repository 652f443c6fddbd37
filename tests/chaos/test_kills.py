"""Ten kills: eight at moments and points that a seed draws, two of vLLM's runs; the benchmark does a hundred."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.draws import Kill
from tests.chaos.lives import Run
from tests.chaos.plan import Fault
from tests.chaos.rounds import SCENARIOS, SYNC, Round, draw_and_play, play_round
from tests.conftest import require
from tests.parts import missing_vllm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos"), pytest.mark.timeout(900)]

_SEED = 7
_NUM_KILLS = 8
_LIFE_S = 12.0


def test_run_that_is_killed_eight_times_equals_the_unbroken_one(tmp_path: Path, model: Path, unbroken: Run) -> None:
    run = Run(folder=tmp_path, model=model, config=SYNC.config())
    rng = random.Random(_SEED)
    rounds: list[Round] = []
    while not (rounds and rounds[-1].is_over):
        is_wanted = sum(played.was_killed for played in rounds) < _NUM_KILLS
        played = (
            draw_and_play(run, rng, life_s=_LIFE_S, twin=unbroken)
            if is_wanted
            else play_round(run, None, twin=unbroken)
        )
        assert played.complaints == ()
        assert played.lost == 0
        rounds.append(played)
    assert rounds[-1].step == run.config["steps"]


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
