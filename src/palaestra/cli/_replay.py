"""`palaestra replay RUN --step N`: one training step again, compared bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_NOT_COMPARED, _DIFFERS = 1, 3


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run, which may be going on.")],
    step: Annotated[int, typer.Option(min=1, help="Policy update to make again.")],
    model: Annotated[str | None, typer.Option(help="Where the model is that the run began with, if it moved.")] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module of yours to import first; repeatable.", metavar="MODULE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make one training step again on a CPU, and compare loss and gradients bit for bit; exit code 3 if they differ."""
    from palaestra.cli._options import import_modules, interruptible, run_to_end
    from palaestra.trainer.replay import replay as make_again
    from palaestra.trainer.replay import run_folder

    import_modules(imports or ())
    folder = run_folder(run)
    with interruptible("the run was only read"):
        found = run_to_end(make_again(folder, step, model=model, say=lambda line: typer.echo(line, err=True)))
    if as_json:
        value = {
            "run": str(folder),
            "step": found.step,
            "start": found.start,
            "compared": found.is_compared,
            "equal": found.is_equal,
            "zero": found.again.now.is_zero if found.again.now is not None else None,
            "difference": found.again.difference,
            "losses": found.again.now.losses.tolist() if found.again.now is not None else None,
            "recorded_losses": found.again.before.losses.tolist() if found.again.before is not None else None,
        }
        typer.echo(json.dumps(value, indent=2))
    else:
        typer.echo(found.describe())
    if not found.is_equal:
        raise typer.Exit(_DIFFERS if found.is_compared else _NOT_COMPARED)
