"""The rollout runner: one policy, one environment, one task -> one episode.

This is the one place that turns an exception into data. Invariants: whatever an environment, a policy or a
reward term does, the caller gets an episode with a typed outcome; a failure of ours never carries a number;
only the death of a component (`WorkerError`), a missing part (`ConfigError`) and cancellation pass through.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from palaestra.agents._cutoff import CutError, Cutoff
from palaestra.agents._policy import Policy, Session
from palaestra.envs import Env
from palaestra.errors import ConfigError, ContextFullError, RewardError, WorkerError
from palaestra.types import Episode, Failure, Message, Outcome, Task, Turn

Boundary = Literal["env", "policy", "reward", "run"]


class _BoundaryError(Exception):
    def __init__(self, boundary: Boundary, cause: Exception) -> None:
        super().__init__(str(cause))
        self.boundary = boundary
        self.cause = cause


@dataclass(slots=True)
class _Record:
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    reward: float = 0.0
    policy_s: float = 0.0
    env_s: float = 0.0


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
    session: Session | None = None
    failure: Failure | None = None
    try:
        async with (cutoff or Cutoff()).scope():
            session = _guarded_session(env, policy, task, seed)
            await _play(env, session, task, seed, record, clock)
        outcome = Outcome(record.info["outcome"])
    except CutError as error:
        outcome, failure = Outcome.CANCELLED, Failure(kind="CutError", message=str(error), boundary="run")
    except _BoundaryError as error:
        outcome, failure = _classify(error)
    finally:
        await env.aclose()
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
        trajectory=session.trajectory() if session is not None else None,
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
        failure=Failure(kind="CutError", message=reason, boundary="run"),
        wall_s=0.0,
    )


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
