"""The rollout runner: one policy, one environment, one task -> one episode.

This is the one place that turns an exception into data. Invariants: whatever an environment, a policy or a
reward term does, the caller gets an episode with a typed outcome; a failure of ours never carries a number;
only the death of a component (`WorkerError`), a missing part (`ConfigError`) and cancellation pass through. An episode
runs in one task of its own from its first word to its last, and once it ends, nobody calls it off any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from palaestra.agents._cutoff import Cutoff
from palaestra.agents._policy import Policy, Session
from palaestra.envs import Env
from palaestra.errors import ConfigError, ContextFullError, RewardError, WorkerError, is_called_off
from palaestra.types import Episode, Failure, Message, Outcome, Task, Turn

Boundary = Literal["env", "policy", "reward", "run"]


class _BoundaryError(Exception):
    def __init__(self, boundary: Boundary, cause: Exception) -> None:
        super().__init__(str(cause))
        self.boundary = boundary
        self.cause = cause


class StrayCancelError(Exception):
    """Somebody cancelled what an episode waited for, and not the episode."""


@dataclass(slots=True)
class _Record:
    session: Session | None = None
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    reward: float = 0.0
    policy_s: float = 0.0
    env_s: float = 0.0
    is_closing: bool = False


async def run_episode(
    env: Env,
    policy: Policy,
    task: Task,
    *,
    episode_id: str,
    seed: int,
    cutoff: Cutoff | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Episode:
    """Play one task to its outcome and close the episode. Times come from `clock`, in seconds.

    When `cutoff` cuts it, the outcome is `cancelled`, and what was played is kept.
    """
    started_s = clock()
    record = _Record()
    cutoff = cutoff or Cutoff()
    playing = asyncio.create_task(
        _play_and_close(env, policy, task, seed, record, clock), name=f"episode {episode_id} of {task.env_id}"
    )
    await _see_through(playing, lambda: not (env.is_ending or record.is_closing), cutoff)
    failure: Failure | None = None
    if playing.cancelled():
        outcome, failure = Outcome.CANCELLED, _cut(cutoff.reason or "the episode was called off")
    else:
        try:
            playing.result()
            outcome = Outcome(record.info["outcome"])
        except _BoundaryError as error:
            outcome, failure = _classify(error)
    is_numbered = outcome in (Outcome.SCORED, Outcome.TRUNCATED)
    return Episode(
        id=episode_id,
        task=task,
        outcome=outcome,
        messages=tuple(record.messages),
        turns=tuple(record.turns),
        reward=record.reward if is_numbered else None,
        terms=record.info.get("terms", ()) if is_numbered else (),
        facts=record.info.get("facts", {}) if is_numbered else {},
        trajectory=record.session.trajectory() if record.session is not None else None,
        failure=failure,
        wall_s=clock() - started_s,
        timings={"policy_s": record.policy_s, "env_s": record.env_s},
    )


def cancelled_episode(task: Task, *, episode_id: str, reason: str) -> Episode:
    """The record of an episode that was called off before it began."""
    return Episode(
        id=episode_id,
        task=task,
        outcome=Outcome.CANCELLED,
        messages=(),
        turns=(),
        reward=None,
        terms=(),
        facts={},
        trajectory=None,
        failure=_cut(reason),
        wall_s=0.0,
    )


def _cut(reason: str) -> Failure:
    return Failure(kind="Cut", message=reason, boundary="run")


async def _see_through(playing: asyncio.Task[None], may_stop: Callable[[], bool], cutoff: Cutoff) -> None:
    """Wait for an episode, and call it off once it is cut or its caller is cancelled, where it may still be stopped.

    A caller that is cancelled waits too, however often: what `begin` took, `end` gives back, in the task that took it.
    """

    def call_off() -> None:
        if may_stop():
            playing.cancel()

    cancelled: asyncio.CancelledError | None = None
    with cutoff.calling(call_off):
        while not playing.done():
            try:
                await asyncio.wait((playing,))
            except asyncio.CancelledError as error:
                cancelled = error
                call_off()
    if cancelled is not None:
        if not playing.cancelled():
            playing.exception()  # seen; that the caller was cancelled comes first
        raise cancelled


async def _play_and_close(
    env: Env, policy: Policy, task: Task, seed: int, record: _Record, clock: Callable[[], float]
) -> None:
    try:
        record.session = _guarded_session(env, policy, task, seed)
        await _play(env, record.session, task, seed, record, clock)
    finally:
        record.is_closing = True
        await env.aclose()


async def _play(env: Env, session: Session, task: Task, seed: int, record: _Record, clock: Callable[[], float]) -> None:
    started_s = clock()
    observation, _ = await _at("env", env.areset(seed=seed, options={"task": task}))
    record.env_s += clock() - started_s
    record.messages.extend(observation)
    is_over = False
    while not is_over:
        acted_s = clock()
        try:
            message = await _at("policy", session.act(observation))
        except _BoundaryError as error:
            if not isinstance(error.cause, ContextFullError):
                raise
            _, record.reward, _, _, record.info = await _at("env", env.atruncate())
            return
        stepped_s = clock()
        record.policy_s += stepped_s - acted_s
        observation, record.reward, terminated, truncated, record.info = await _at("env", env.astep(message))
        record.env_s += clock() - stepped_s
        record.messages.extend((message, *observation))
        is_over = terminated or truncated
        if len(env.turns) > len(record.turns):
            record.turns.append(replace(env.turns[-1], policy_s=stepped_s - acted_s))


async def _at(boundary: Boundary, awaitable: Any) -> Any:
    try:
        return await awaitable
    except (WorkerError, ConfigError):
        raise  # a component died, or this machine lacks a part: the run must stop by name, not collect failures
    except asyncio.CancelledError as error:
        if is_called_off():
            raise
        stray = StrayCancelError("what the episode waited for was cancelled by somebody else")
        raise _BoundaryError(boundary, stray) from error
    except Exception as error:  # the one place where any error becomes a typed outcome
        raise _BoundaryError(boundary, error) from error


def _guarded_session(env: Env, policy: Policy, task: Task, seed: int) -> Session:
    try:
        return policy.session(env, task, seed=seed)
    except ConfigError:
        raise
    except Exception as error:  # as above: a policy that cannot even begin is a failed episode
        raise _BoundaryError("policy", error) from error


def _classify(error: _BoundaryError) -> tuple[Outcome, Failure]:
    boundary = error.boundary
    outcome = Outcome.INFRA_ERROR
    if isinstance(error.cause, RewardError):
        boundary, outcome = "reward", Outcome.UNSCORABLE
    message = " ".join(str(error.cause).split()) or "no message"
    return outcome, Failure(kind=type(error.cause).__name__, message=message, boundary=boundary)
