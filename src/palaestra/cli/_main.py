"""The application and its exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from palaestra import __version__
from palaestra.cli import _doctor, _envs, _eval, _quickstart, _replay, _sandbox, _size, _train
from palaestra.errors import FULL, ConfigError, PalaestraError, TaskError, WorkerError, leaves

_USER_ERRORS = (ConfigError, TaskError)
_EXIT_FAILURE, _EXIT_USER = 1, 2

app = typer.Typer(
    name="palaestra",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Agentic environments behind the Gymnasium interface, and an asynchronous GRPO trainer.",
)
app.command("envs")(_envs.envs)
app.command("eval")(_eval.evaluate)
app.command("train")(_train.train)
app.command("size")(_size.size)
app.command("quickstart")(_quickstart.quickstart)
app.command("doctor")(_doctor.doctor)
app.command("replay")(_replay.replay)
app.add_typer(_sandbox.app)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"palaestra {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `palaestra` command."""
    try:
        app()
    except BaseExceptionGroup as group:
        sys.exit(_report(group))
    except (PalaestraError, OSError) as error:
        sys.exit(_report(error))


def _report(error: BaseException) -> int:
    found = list(leaves(error))
    for leaf in found:
        if _means_full_disk(leaf):
            _say(f"the disk is full: free space and run the same command again ({leaf})")
            return _EXIT_FAILURE
        if isinstance(leaf, PalaestraError):
            _say(" ".join(str(leaf).split()))
            return _EXIT_USER if isinstance(leaf, _USER_ERRORS) else _EXIT_FAILURE
    # not one of ours: a bug, whose traceback is worth more than its absence
    if os.environ.get("PALAESTRA_DEBUG") or not all(isinstance(leaf, OSError) for leaf in found):
        traceback.print_exception(error)
    _say(f"{type(found[0]).__name__}: {found[0]}")
    return _EXIT_FAILURE


def _means_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    # a worker's OSError arrives as text
    return isinstance(error, WorkerError) and any(os.strerror(number) in str(error) for number in FULL)


def _say(line: str) -> None:
    print(f"palaestra: {line}", file=sys.stderr, flush=True)
