"""Flags shared by commands: assignments, environments with weights."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from palaestra.config import load_toml, override
from palaestra.errors import ConfigError, leaves

if TYPE_CHECKING:
    from palaestra.trainer.job import Job

INTERRUPTED = 130
"""Exit code of a command that its user stopped."""


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["rl.steps=10"]` as `{"rl.steps": 10}`; values are JSON, else plain text."""
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set takes key=value, not {assignment!r}")
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = text
    return parsed


def parse_weights(names: Sequence[str]) -> dict[str, float]:
    """`["a/B-v0=2", "a/C-v0"]` as `{"a/B-v0": 2.0, "a/C-v0": 1.0}`."""
    weights: dict[str, float] = {}
    for name in names:
        env_id, _, weight = name.partition("=")
        try:
            weights[env_id] = float(weight or 1.0)
        except ValueError as error:
            raise ConfigError(f"--env takes an id, or id=weight with a number, not {name!r}") from error
    return weights


def import_modules(names: Sequence[str]) -> None:
    """Import a user's modules, for what they register; they are looked for in the working directory last."""
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
        # the learner's process imports the module of a loss by itself
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()])
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module of theirs may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"cannot import {name!r}: {type(error).__name__}: {reason}") from error


def load_job(config: Path, assignments: Sequence[str], imports: Sequence[str]) -> Job:
    """The training job in a TOML file, after its modules and `imports` were imported; raises `ConfigError`."""
    from palaestra.trainer.job import Job, listed_modules  # behind torch: --help must not wait for it

    values = override(load_toml(config), parse_assignments(assignments))
    import_modules([*listed_modules(values), *imports])
    return Job.parse(values, source=str(config))


@contextmanager
def interruptible(afterwards: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line that says what `afterwards` comes of it, and exit code 130."""
    try:
        with _terminable():
            yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        _leave(afterwards)
    except BaseExceptionGroup as group:
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(group)):
            _leave(afterwards)
        raise


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what is in here as Ctrl-C does: by default it would leave processes and folders behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _as_ctrl_c)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does at this moment: a running event loop cancels its task, and breaks none that is at work."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)


def _leave(afterwards: str) -> None:
    print(f"palaestra: interrupted; {afterwards}", file=sys.stderr, flush=True)
    raise typer.Exit(INTERRUPTED)
