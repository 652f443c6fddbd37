"""What commands share: assignments, environments with weights, modules and jobs, and how they are stopped."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from palaestra.config import load_toml, override
from palaestra.errors import ConfigError, leaves

if TYPE_CHECKING:
    from palaestra.trainer.job import Job

ResultT = TypeVar("ResultT")

INTERRUPTED = 130
"""Exit code of a command that its user stopped."""

_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


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


def with_flags(values: dict[str, Any], assignments: Sequence[str], imports: Sequence[str]) -> dict[str, Any]:
    """An unchecked job with its flags, after the modules that it lists and `imports` were imported."""
    values = override(values, parse_assignments(assignments))
    from palaestra.trainer.job import listed_modules  # takes seconds: neither --help nor a refusal waits for it

    import_modules([*listed_modules(values), *imports])
    return values


def load_job(config: Path, assignments: Sequence[str], imports: Sequence[str]) -> Job:
    """The training job in a TOML file, with `imports` among its modules; raises `ConfigError`."""
    values = with_flags(load_toml(config), assignments, imports)
    from palaestra.trainer.job import Job

    job = Job.parse(values, source=str(config))
    added = [name for name in imports if name not in job.imports]
    return job.model_copy(update={"imports": [*job.imports, *added]}) if added else job


@contextmanager
def interruptible(afterwards: str) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a closed terminal into one line on what `afterwards` comes of it, and exit code 130."""
    try:
        with _ended_by(signal.default_int_handler):
            yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        _leave(afterwards)
    except BaseExceptionGroup as group:
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(group)):
            _leave(afterwards)
        raise


def run_to_end(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """`asyncio.run` inside `interruptible`: a signal cancels the work, once, and never breaks into its loop.

    asyncio does so for Ctrl-C alone, and not where that is ignored, as in a background job of a script.
    """

    async def owned() -> ResultT:
        owner, loop = asyncio.current_task(), asyncio.get_running_loop()

        def cancel(number: int, frame: FrameType | None) -> None:
            if owner is not None and not owner.cancelling():
                loop.call_soon_threadsafe(owner.cancel)  # which also wakes a loop that waits

        with _ended_by(cancel):
            return await work

    return asyncio.run(owned())


@contextmanager
def _ended_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Take what by default would leave processes and folders behind; what `nohup` has ignored stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in _ENDINGS}
    taken = {number: former for number, former in previous.items() if former is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in taken.items():
            signal.signal(number, former)


def _leave(afterwards: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"palaestra: interrupted; {afterwards}", file=sys.stderr, flush=True)
    raise typer.Exit(INTERRUPTED)
