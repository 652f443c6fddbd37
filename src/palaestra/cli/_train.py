"""`palaestra train CONFIG.toml`: GRPO on a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from palaestra.config import Config, load_toml, override


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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per update and a last one.")] = False,
) -> None:
    """Train a model by GRPO on a suite of environments; the same command resumes a stopped run."""
    from palaestra.cli._options import INTERRUPTED, import_modules, interruptible, parse_assignments
    from palaestra.trainer import Trainer
    from palaestra.trainer.metrics import StepRecord, one_line

    values = override(load_toml(config), parse_assignments(assignments or ()))
    import_modules([*_listed_modules(values), *(imports or ())])
    job = _job_class().parse(values, source=str(config))

    def show(record: StepRecord) -> None:
        typer.echo(json.dumps(record.to_json()) if as_json else one_line(record))

    trainer = Trainer(job.model, job.train, run=run or job.run, on_step=show)
    if not as_json:
        typer.echo(f"run folder: {trainer.run}")
    with interruptible("the same command goes on from the last checkpoint"):
        result = trainer.fit(job.suite.build())
    summary = {"run": str(trainer.run), "version": result.version, "complete": result.is_complete}
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        state = "done" if result.is_complete else "stopped; the same command goes on from there"
        typer.echo(f"version {result.version}: {state}. The model is in {result.model}")
    if not result.is_complete:
        raise typer.Exit(INTERRUPTED)


def _listed_modules(values: dict[str, Any]) -> list[str]:
    # read before the job is checked, since the check looks up names that these modules register
    listed = values.get("imports")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _job_class() -> Any:
    # built on demand: GRPOConfig lives behind torch, and --help must not wait for it
    from palaestra.envs import EnvSuite
    from palaestra.trainer import GRPOConfig
    from palaestra.types import Form

    class Suite(Config):
        """What to play."""

        weights: dict[str, float]
        """Environments and how often each is drawn."""
        form: Form = "full"
        """How tasks are worded."""
        options: dict[str, dict[str, Any]] = Field(default_factory=dict)
        """Constructor arguments by environment."""

        def build(self) -> EnvSuite:
            return EnvSuite(self.weights, form=self.form, options=self.options)

    class Job(Config):
        """A training job."""

        model: str
        """Hugging Face model folder or id."""
        run: Path | None = None
        """Run folder."""
        imports: list[str] = Field(default_factory=list)
        """Modules of yours that register environments, losses and advantages."""
        suite: Suite
        """What to play."""
        train: GRPOConfig = GRPOConfig()
        """How to train."""

    return Job
