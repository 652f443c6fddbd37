"""Every error that Palaestra raises, one class per boundary it can cross.

    PalaestraError
    ├── ConfigError          the user's configuration, flags or files
    ├── TaskError            a task or environment definition is wrong
    ├── PolicyError          the agent's side: engine, renderer, model endpoint
    │   └── ContextFullError     the conversation no longer fits the model (an outcome, not a fault)
    ├── SandboxError         our infrastructure below an environment: jail, container, browser, server
    ├── RewardError          a reward term raised or returned nothing
    ├── WorkerError          one of our own processes died, hung or answered with an exception
    │   └── StepRefusedError     the learner would not make a step, and changed nothing
    └── LedgerError          the durable record of a run is damaged, locked or inconsistent

The message says what happened, with which value, and what to do. All classes pickle.
Failures of the *agent* (its code crashed, its call was malformed) are observations, never exceptions.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk, or a user's share of it, is full."""


class PalaestraError(Exception):
    """Root of everything that Palaestra raises on purpose."""


class ConfigError(PalaestraError):
    """The user's configuration, flags, files or machine cannot serve the request."""


class TaskError(PalaestraError):
    """An environment or task definition is wrong."""


class PolicyError(PalaestraError):
    """The policy's side failed: engine, renderer or model endpoint."""


class ContextFullError(PolicyError):
    """The conversation no longer fits the model's context; the episode ends as truncated."""


class SandboxError(PalaestraError):
    """The infrastructure below an environment failed; the agent is not to blame."""


class RewardError(PalaestraError):
    """A reward term raised, or had no value to give."""


class WorkerError(PalaestraError):
    """A process of ours died, missed its deadline, or answered with an exception."""


class StepRefusedError(WorkerError):
    """A number in a batch is not finite; weights, optimiser and version are as they were."""


class LedgerError(PalaestraError):
    """The durable record of a run is damaged, locked by another process, or inconsistent."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside nested exception groups, in order; a plain error is its own only leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


@contextmanager
def ungrouped() -> Iterator[None]:
    """Let the first `PalaestraError` of an exception group leave as itself, with the group as its cause.

    Task groups wrap what their tasks raise; the caller of a public function wants the one line.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        for leaf in leaves(group):
            if isinstance(leaf, PalaestraError):
                raise leaf from group
        raise


def is_called_off() -> bool:
    """Whether a `CancelledError` that is caught now is meant for the running task, not only for what it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def refuse_inside_a_loop(plain: str, awaitable: str) -> None:
    """Raise `ConfigError` in a running event loop, where a function that runs a loop of its own cannot be called."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigError(f"{plain} cannot run inside an event loop: await {awaitable} there")
