"""`palaestra quickstart`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def quickstart(
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything; 0 by default.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder; an interrupted one is resumed.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face model or folder, instead of a small new one.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the job.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: --set rl.steps=10.", metavar="KEY=VALUE")
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module of yours to import first; repeatable.", metavar="MODULE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Make, warm up and train a small agent in three families of environments, and judge it on held-out tasks."""
    from palaestra.cli._options import INTERRUPTED, import_modules, interruptible, parse_assignments, run_to_end
    from palaestra.config import load_toml, merge, override

    values: dict[str, Any] = load_toml(config) if config is not None else {}
    flags = {key: value for key, value in (("seed", seed), ("model", model)) if value is not None}
    values = override(values, {**flags, **parse_assignments(assignments or ())})
    from palaestra.trainer.progress import SilentDisplay, TerminalDisplay
    from palaestra.trainer.quickstart import FOR_GIVEN_MODEL, QuickstartConfig, run_quickstart

    import_modules(imports or ())
    if values.get("model") is not None:
        values = merge(FOR_GIVEN_MODEL, values)
    settings = QuickstartConfig.parse(values, source=str(config or "quickstart"))
    display = SilentDisplay() if as_json else TerminalDisplay()
    folder = run or Path("runs") / f"quickstart-seed{settings.seed}"
    display.say(f"run folder: {folder}")
    with interruptible("the same command goes on where it stopped"):
        result = run_to_end(run_quickstart(settings, folder, display))
    if as_json:
        evaluations = {key: report.to_json() for key, report in result.evaluations.items()}
        typer.echo(json.dumps({"run": str(result.run), "complete": result.is_complete, "evaluations": evaluations}))
    elif result.report is not None:
        display.say(f"report: {result.report}")
    if not result.is_complete:
        raise typer.Exit(INTERRUPTED)
