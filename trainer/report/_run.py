"""The report of a training run: its loop times, plots and facts, and the predicted step where one was kept."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palaestra.errors import ConfigError
from palaestra.trainer.report._page import Stage, write_report
from palaestra.trainer.report._predicted import Comparison, compare
from palaestra.trainer.sizing import conditions_of, read_size

if TYPE_CHECKING:
    from palaestra.trainer.config import GRPOConfig
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
    except ConfigError as error:
        return Comparison(rows=(), verdict=f"Not compared: {error}.")
    return compare(predictions, conditions_of(model, suite, config), result.steps) if predictions is not None else None


def _facts(result: FitResult, model: str, suite: Mapping[str, Any], config: GRPOConfig) -> dict[str, str]:
    return {
        "model": model,
        "environments": ", ".join(suite["weights"]),
        "updates": f"{result.version} of {config.steps}",
        "batch": f"{config.groups_per_step} groups of {config.group_size} episodes, {config.concurrency} at once",
        "mode": config.mode if config.mode == "sync" else f"async, lag at most {config.max_lag}",
        "engine": config.engine,
        "seed": str(config.seed),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, {platform.system()}",
    }
