"""`palaestra train CONFIG.toml`: GRPO on a suite."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from palaestra.envs import EnvSuite
    from palaestra.trainer import Trainer
    from palaestra.trainer.trainer import FitResult


def train(
    config: Annotated[Path, typer.Argument(help="TOML file with model, run, [suite] and [train].")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: --set train.steps=10.", metavar="KEY=VALUE")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; an existing one is resumed.")] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module of yours to import first; repeatable.", metavar="MODULE"),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", help="A change with which to go on that must be named: suite; repeatable.", metavar="KEY"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per update and a last one.")] = False,
) -> None:
    """Train a model by GRPO on a suite of environments; the same command resumes a stopped run."""
    from palaestra.cli._options import INTERRUPTED, interruptible

    with interruptible("the same command goes on from the last checkpoint"):
        trainer, suite = _prepare(config, assignments or (), run, imports or (), allow or (), as_json)
        if not as_json:
            typer.echo(f"run folder: {trainer.run}")
        started_s = time.monotonic()
        result = trainer.fit(suite)
    report = _report(trainer, suite, result, time.monotonic() - started_s)
    summary = {"run": str(trainer.run), "version": result.version, "complete": result.is_complete, "report": report}
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        state = "done" if result.is_complete else "stopped; the same command goes on from there"
        typer.echo(f"version {result.version}: {state}. The model is in {result.model}")
        typer.echo(f"report: {report}")
    if not result.is_complete:
        raise typer.Exit(INTERRUPTED)


def _report(trainer: Trainer, suite: EnvSuite, result: FitResult, seconds: float) -> str:
    from palaestra.trainer.report import write_run_report  # behind Matplotlib

    page = write_run_report(
        trainer.run, result, model=trainer.model, suite=suite.describe(), config=trainer.config, seconds=seconds
    )
    return str(page)


def _prepare(
    config: Path,
    assignments: Sequence[str],
    run: Path | None,
    imports: Sequence[str],
    allow: Sequence[str],
    as_json: bool,
) -> tuple[Trainer, EnvSuite]:
    from palaestra.cli._options import load_job

    job = load_job(config, assignments, imports)
    from palaestra.trainer import Trainer
    from palaestra.trainer.metrics import StepRecord, one_line

    def show(record: StepRecord) -> None:
        typer.echo(json.dumps(record.to_json()) if as_json else one_line(record))

    def tell(line: str) -> None:
        typer.echo(f"palaestra: {line}", err=True)

    trainer = Trainer(job.model, job.train, run=run or job.run, on_step=show, on_note=tell, allow=allow)
    return trainer, job.suite.build()
