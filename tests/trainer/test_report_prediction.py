"""The report of a training run: it stands without evaluations, and holds predictions against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.job import Job
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.report import compare, write_run_report
from palaestra.trainer.sizing import PredictedSettings, Prediction, conditions_of, propose, write_size
from palaestra.trainer.sizing._record import SIZE_FILE
from palaestra.trainer.trainer import FitResult
from tests.toys import register_echo
from tests.trainer.test_report import make_step
from tests.trainer.test_sizing_model import measurements

register_echo()

PREDICTION = Prediction(step_s=5.0, generation_s=3.0, wait_s=3.0, learn_s=2.0, sync_s=0.0, ideal_s=2.0, tokens=400.0)
PREDICTED = PredictedSettings(name="now", conditions={"train.mode": "sync", "cores": 2}, predicted=PREDICTION)


def step(number: int, **changes: float) -> dict[str, object]:
    return make_step(number) | changes


def test_medians_stand_beside_the_prediction_without_the_first_step() -> None:
    steps = [step(1, wall_s=99.0), step(2, wall_s=4.0), step(3, wall_s=5.0), step(4, wall_s=9.0)]
    found = compare([PREDICTED], PREDICTED.conditions, steps)
    assert [(row.name, row.predicted_s, row.measured_s) for row in found.rows] == [
        ("whole step", 5.0, 5.0),
        ("waiting for rollouts", 3.0, 2.5),
        ("learning", 2.0, 1.0),
        ("weight sync", 0.0, 0.5),
    ]
    assert [row.ratio for row in found.rows] == [1.0, pytest.approx(2.5 / 3), 0.5, None]
    assert found.verdict == "The prediction held: the median of 3 of 4 steps took 1.00 times the predicted seconds."


def test_errors_that_cancel_out_are_named() -> None:
    found = compare([PREDICTED], PREDICTED.conditions, [step(1, wall_s=5.0, wait_s=1.0, learn_s=4.0, sync_s=0.0)])
    assert found.verdict.startswith("The prediction held")
    assert (
        "Waiting for rollouts took 1.00 s instead of 3.00 s. Learning took 4.00 s instead of 2.00 s." in found.verdict
    )
    assert "Weight sync" not in found.verdict


def test_a_prediction_that_did_not_hold_says_so_and_names_other_episodes() -> None:
    steps = [step(1, wall_s=10.0, num_sampled_tokens=1000)]
    verdict = compare([PREDICTED], PREDICTED.conditions, steps).verdict
    assert "did not hold: the median of 1 of 1 steps took 2.00 times" in verdict
    assert "A step sampled 2.50 times the tokens" in verdict


def test_other_settings_are_named_and_not_compared() -> None:
    far = replace(PREDICTED, name="proposed", conditions={"train.mode": "async", "cores": 8})
    found = compare([far, PREDICTED], {"train.mode": "sync", "cores": 4}, [step(1)])
    assert found.rows == ()
    assert found.verdict.startswith("Not compared: the prediction was made for other settings (cores).")


def test_no_step_is_nothing_to_compare() -> None:
    found = compare([PREDICTED], PREDICTED.conditions, [])
    assert found.rows == ()
    assert "No step was made" in found.verdict


def fitted(run: Path, *, is_complete: bool = True) -> FitResult:
    steps = [step(number) for number in (1, 2)]
    return FitResult(version=2, is_complete=is_complete, model=run / "model", steps=steps)


JOB = Job.parse({"model": "some/hub-name", "suite": {"weights": {"test/Echo-v0": 1.0}}, "train": {"steps": 2}})


async def record(run: Path, *configs: GRPOConfig) -> None:
    """A ledger whose steps were made with these configurations, one each."""
    ledger = await Ledger.open(run, meta={})
    for number, config in enumerate(configs, 1):
        await ledger.use_config(config.model_dump(mode="json"))
        await ledger.train([], number, step(number))
    await ledger.aclose()


def report(run: Path, config: GRPOConfig, *, is_complete: bool = True) -> str:
    suite = JOB.suite.build().describe()
    result = fitted(run, is_complete=is_complete)
    return write_run_report(run, result, model=JOB.model, suite=suite, config=config, seconds=9.0).read_text()


def test_a_run_without_prediction_has_plots_and_facts(tmp_path: Path) -> None:
    page = report(tmp_path, JOB.train)
    assert f"Training run {tmp_path.name}" in page
    assert "Held-out success" not in page
    assert "Predicted and measured" not in page
    assert page.count("data:image/png;base64,") == 6
    assert "The training loop's time" in page or "The training loop&#39;s time" in page
    assert "test/Echo-v0" in page
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["predicted"] is None
    assert values["loop_times"]["wall_s"] == 8.0


def test_a_stopped_run_has_a_report_too(tmp_path: Path) -> None:
    assert "stopped at update 2 of 20" in report(
        tmp_path, JOB.train.model_copy(update={"steps": 20}), is_complete=False
    )


async def test_a_kept_prediction_has_a_section(tmp_path: Path) -> None:
    await record(tmp_path, JOB.train, JOB.train)
    proposal = propose(measurements(), JOB.train)
    write_size(tmp_path, JOB, JOB, measurements(), proposal)
    page = report(tmp_path, JOB.train)
    assert "Predicted and measured step time" in page
    assert f"{proposal.now.step_s:.2f}" in page
    values = json.loads((tmp_path / "report.json").read_text())["predicted"]
    assert values["times"][0]["name"] == "whole step"
    other = report(tmp_path, JOB.train.model_copy(update={"concurrency": 3}))
    assert "other settings (train.concurrency)" in other


async def test_steps_made_with_other_settings_are_not_held_against_the_prediction(tmp_path: Path) -> None:
    before = JOB.train.model_copy(update={"concurrency": 3})
    await record(tmp_path, before, JOB.train.model_copy(update={"seed": 9}))
    write_size(tmp_path, JOB, JOB, measurements(), propose(measurements(), JOB.train))
    page = report(tmp_path, JOB.train)
    assert "the median of 1 of 1 steps" in page, "a seed changes no time"
    assert "Not counted: 1 made with other settings." in page
    gone_on = report(tmp_path, JOB.train.model_copy(update={"num_spare": 1}))
    assert "other settings (train.num_spare)" in gone_on


def test_a_prediction_without_a_ledger_is_not_compared(tmp_path: Path) -> None:
    write_size(tmp_path, JOB, JOB, measurements(), propose(measurements(), JOB.train))
    assert "Not compared: " in report(tmp_path, JOB.train)


def test_a_damaged_prediction_does_not_cost_the_report(tmp_path: Path) -> None:
    (tmp_path / SIZE_FILE).write_text("{")
    assert "cannot be read" in report(tmp_path, JOB.train)


def test_the_model_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    suite = JOB.suite.build().describe()
    one, two = (conditions_of(str(tmp_path / name), suite, JOB.train) for name in ("one", "two"))
    assert one == two
