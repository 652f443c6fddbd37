"""Evaluation: reproducible, order-free, and honest about what has no score."""

from __future__ import annotations

import json

import pytest

from palaestra.agents import ExpertPolicy, RandomPolicy, aevaluate, evaluate
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError
from tests.toys import register_echo

register_echo()

SUITE = EnvSuite({"test/Echo-v0": 1.0}, active_split="test")


def test_expert_solves_everything() -> None:
    report = evaluate(ExpertPolicy(), SUITE, tasks=12)
    assert report.success.rate == 1.0
    assert report.outcomes == {"scored": 12}
    assert report.pass_at == {1: 1.0}


def test_result_does_not_depend_on_concurrency() -> None:
    serial = evaluate(ExpertPolicy(skill=0.5), SUITE, tasks=20, samples=3, concurrency=1)
    parallel = evaluate(ExpertPolicy(skill=0.5), SUITE, tasks=20, samples=3, concurrency=16)
    assert [e.messages for e in serial.episodes] == [e.messages for e in parallel.episodes]
    assert 0.0 < serial.success.rate < 1.0
    assert serial.pass_at[3] > serial.pass_at[1]


def test_failures_of_ours_are_reported_beside_the_rate() -> None:
    broken = EnvSuite({"test/Echo-v0": 1.0}, active_split="test", options={"test/Echo-v0": {"fault": "verify"}})
    report = evaluate(ExpertPolicy(), broken, tasks=4)
    assert report.outcomes == {"infra_error": 4}
    assert report.success.count == 0
    assert report.pass_at == {}
    assert (report.num_failed, report.commonest_failure) == (4, "the judge is gone")
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["success"] == {"rate": None, "low": None, "high": None, "count": 0}
    assert value["mean_reward"] is None


async def test_evaluate_inside_a_loop_says_what_to_call() -> None:
    with pytest.raises(ConfigError, match="await aevaluate"):
        evaluate(RandomPolicy(), SUITE, tasks=1)


async def test_too_many_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 60 test tasks"):
        await aevaluate(RandomPolicy(), SUITE, tasks=61)


def test_report_is_json() -> None:
    value = evaluate(ExpertPolicy(), SUITE, tasks=2).to_json()
    assert value["by_env"]["test/Echo-v0"]["count"] == 2
