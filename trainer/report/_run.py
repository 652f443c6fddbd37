"""The report of a training run: its loop times, plots and facts, and the predicted step where one was kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palaestra.errors import PalaestraError
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.ledger import read_configs
from palaestra.trainer.report._page import Stage, write_report
from palaestra.trainer.report._predicted import Comparison, compare
from palaestra.trainer.sizing import conditions_of, read_size

if TYPE_CHECKING:
    from palaestra.trainer.trainer import FitResult


def write_run_report(
    run: Path, result: FitResult, *, model: str, suite: Mapping[str, Any], config: GRPOConfig, seconds: float
) -> Path:
    """Write the report of a run that ended or was stopped into its folder; the page's path.

    `suite` is what the suite describes itself as; `seconds` is the time since this process began to train.
    """
    state = "complete" if result.is_complete else f"stopped at update {result.version} of {config.steps}"
    return write_report(
        run,
        title=f"Training run {run.name}",
        stages=[Stage(name="training", seconds=seconds, note=f"{state}; this start alone, parts and export included")],
        evaluations=(),
        steps=result.steps,
        facts=_facts(result, model, suite, config),
        comparison=_comparison(run, model, suite, config, result),
    )


def _comparison(
    run: Path, model: str, suite: Mapping[str, Any], config: GRPOConfig, result: FitResult
) -> Comparison | None:
    try:
        predictions = read_size(run)
        if predictions is None:
            return None
        conditions = conditions_of(model, suite, config)
        made_with = [json.dumps(values) for _, values in read_configs(run, [step["step"] for step in result.steps])]
        # a run may have gone on with other settings than it began with
        is_same = {
            text: conditions_of(model, suite, GRPOConfig.parse(json.loads(text))) == conditions
            for text in dict.fromkeys(made_with)
        }
        steps = [step for step, text in zip(result.steps, made_with, strict=True) if is_same[text]]
    except PalaestraError as error:
        return Comparison(rows=(), verdict=f"Not compared: {error}.")
    found = compare(predictions, conditions, steps)
    num_others = len(result.steps) - len(steps)
    others = f" Not counted: {num_others} made with other settings." if num_others else ""
    return replace(found, verdict=found.verdict + others)


def _facts(result: FitResult, model: str, suite: Mapping[str, Any], config: GRPOConfig) -> dict[str, str]:
    return {
        "model": model,
        "environments": ", ".join(suite["weights"]),
        "updates": f"{result.version} of {config.steps}",
        "batch": f"{config.groups_per_step} groups of {config.group_size} episodes, {config.concurrency} at once",
        "mode": config.mode if config.mode == "sync" else f"{config.mode}, lag at most {config.max_lag}",
        "engine": config.engine,
        "seed": str(config.seed),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, {platform.system()}",
    }
