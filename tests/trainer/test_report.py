"""The report: stands alone, holds the numbers, draws only what has data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palaestra.agents import EvalReport, ExpertPolicy, RandomPolicy, evaluate
from palaestra.envs import EnvSuite
from palaestra.trainer.report import Stage, draw_plots, write_report
from tests.toys import register_echo

register_echo()


@pytest.fixture(scope="module")
def evaluations() -> list[EvalReport]:
    suite = EnvSuite({"test/Echo-v0": 1.0}, active_split="test")
    return [evaluate(policy, suite, tasks=10) for policy in (RandomPolicy(), ExpertPolicy())]


def make_step(step: int) -> dict[str, object]:
    return {
        "step": step,
        "wall_s": 4.0,
        "wait_s": 2.5,
        "learn_s": 1.0,
        "sync_s": 0.5,
        "success_by_env": {"test/Echo-v0": step / 10},
        "terms": {"success": step / 10, "unsafe": None},
        "lag_mean": 0.5,
        "lag_max": 1,
        "num_sampled_tokens": 400,
        "num_episodes": 20,
        "use_engine": 0.8,
        "use_learner": 0.25,
        "use_envs": 0.5,
    }


def test_page_stands_alone_and_holds_the_numbers(tmp_path: Path, evaluations: list[EvalReport]) -> None:
    page = write_report(
        tmp_path,
        title="A <run>",
        stages=[Stage(name="imitation", seconds=12.0, note="gate passed")],
        evaluations=evaluations,
        steps=[make_step(1), make_step(2)],
        facts={"seed": "0"},
    ).read_text()
    assert "A &lt;run&gt;" in page
    assert "100.0% [72.2%, 100.0%] of 10" in page
    assert "gate passed" in page
    assert 'src="http' not in page
    assert "href=" not in page
    assert page.count("data:image/png;base64,") == 7
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["loop_times"] == {
        "wall_s": 8.0, "wait_s": 5.0, "learn_s": 2.0, "sync_s": 1.0,
        "use_engine": pytest.approx(0.8), "use_learner": pytest.approx(0.25), "use_envs": pytest.approx(0.5),
    }  # fmt: skip


def test_plots_without_data_are_left_out(tmp_path: Path, evaluations: list[EvalReport]) -> None:
    assert list(draw_plots(tmp_path, evaluations, [])) == ["Held-out success by environment, 95 % intervals"]
    assert draw_plots(tmp_path, [], []) == {}
