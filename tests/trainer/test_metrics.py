"""The record of a step: who counts in which mean, on numbers counted by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import StepReport
from palaestra.trainer.metrics import StepRecord, StepTimes, summarise_step
from palaestra.trainer.rows import is_trainable
from palaestra.types import Episode, Group, Message, Outcome, Turn
from tests.trainer.test_ledger import make_group

GROUP = make_group(0)
BEGUN = GROUP.episodes[0]


def record_of(
    *episodes: Episode, busy_s: tuple[float, float] = (0.0, 0.0), train_on_truncated: bool = True
) -> StepRecord:
    return summarise_step(
        [Group(id="0", task=GROUP.task, episodes=episodes)],
        report=StepReport(metrics={}, version=5, seconds=1.0),
        times=StepTimes(wait_s=2.0, learn_s=1.0, sync_s=1.0),
        dropped=[],
        canary=None,
        engine_busy_before_s=busy_s[0],
        engine_busy_s=busy_s[1],
        generated=8,
        verified=7,
        concurrency=4,
        is_trained=partial(is_trainable, config=GRPOConfig(train_on_truncated=train_on_truncated)),
    )


def cut(num_turns: int, *, has_begun: bool = True) -> Episode:
    timings = {"policy_s": 0.1, "env_s": 0.1} if has_begun else {}
    turns = (Turn(action=Message("assistant", "ant"), observation=()),) * num_turns
    return replace(BEGUN, outcome=Outcome.CANCELLED, reward=None, terms=(), turns=turns, timings=timings)


def sampled_by(versions: Sequence[int]) -> Episode:
    trajectory = BEGUN.trajectory
    assert trajectory is not None
    later = np.where(trajectory.loss_mask, np.resize(versions, len(trajectory)), -1).astype(np.int32)
    return replace(BEGUN, trajectory=replace(trajectory, versions=later))


def test_turns_of_those_cut_are_of_those_that_had_begun() -> None:
    assert record_of(BEGUN, cut(1), cut(3), cut(0, has_begun=False)).num_turns_cut == 2.0
    assert math.isnan(record_of(BEGUN, cut(0, has_begun=False)).num_turns_cut)


def test_versions_are_those_of_sampled_tokens_in_episodes_that_are_trained() -> None:
    assert record_of(sampled_by([4]), sampled_by([4])).num_versions == 1
    assert record_of(sampled_by([3]), sampled_by([4])).num_versions == 2
    unscored = replace(sampled_by([2]), outcome=Outcome.TIMEOUT, reward=None, terms=())
    assert record_of(sampled_by([4]), unscored).num_versions == 1
    truncated = replace(sampled_by([2]), outcome=Outcome.TRUNCATED)
    assert record_of(sampled_by([4]), truncated).num_versions == 2
    assert record_of(sampled_by([4]), truncated, train_on_truncated=False).num_versions == 1


def test_a_group_has_one_reward_where_those_that_are_trained_have() -> None:
    truncated = replace(BEGUN, outcome=Outcome.TRUNCATED, reward=-9.0)
    assert record_of(BEGUN, BEGUN, truncated).zero_variance == 0.0
    assert record_of(BEGUN, BEGUN, truncated, train_on_truncated=False).zero_variance == 1.0


def test_use_of_the_engine_is_of_this_step() -> None:
    record = record_of(BEGUN, busy_s=(10.0, 13.0))
    assert (record.use_engine, record.engine_busy_s) == (0.75, 13.0)
