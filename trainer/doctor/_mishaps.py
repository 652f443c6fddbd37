"""Ways for an episode to go in which an environment may leave something behind: played out, failed, cut.

Invariant: each kind of play ends in the environment's `end`, and only the first two may end with a score.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType

from palaestra.agents import Cutoff, ExpertPolicy, Policy, RandomPolicy, Session
from palaestra.envs import Env
from palaestra.errors import PolicyError
from palaestra.types import Message, Observation, Task, Trajectory


class Way(StrEnum):
    """How an episode is meant to go."""

    RANDOM = "random calls"
    EXPERT = "the expert"
    FAILING = "a policy that fails at once"
    FAILING_LATE = "a policy that fails after a call"
    CUT = "a cut after a call"
    CUT_EARLY = "a cut while it begins"


WAYS = (Way.RANDOM, Way.EXPERT, Way.FAILING, Way.RANDOM, Way.CUT, Way.FAILING_LATE, Way.RANDOM, Way.CUT_EARLY)
"""The ways of a round's episodes, in turns; the random ones are judged by reward and latency too."""

_REASON = "the doctor cuts this episode on purpose"


class Mishap:
    """`num_calls` random calls; then `happen` is called."""

    name = "mishap"

    def __init__(self, happen: Callable[[], None], num_calls: int) -> None:
        self._happen = happen
        self._num_calls = num_calls

    def session(self, env: Env, task: Task, *, seed: int) -> Session:
        """A random session that breaks."""
        return _Broken(RandomPolicy().session(env, task, seed=seed), self._happen, self._num_calls)

    async def __aenter__(self) -> Mishap:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _Broken:
    def __init__(self, inner: Session, happen: Callable[[], None], num_left: int) -> None:
        self._inner = inner
        self._happen = happen
        self._num_left = num_left

    async def act(self, observation: Observation) -> Message:
        if self._num_left == 0:
            self._happen()
            await asyncio.sleep(0)  # a cut comes at the next wait
        self._num_left -= 1
        return await self._inner.act(observation)

    def trajectory(self) -> Trajectory | None:
        return None


def arrange(way: Way, *, has_expert: bool, begin_s: float) -> tuple[Policy, Cutoff]:
    """Policy and cutoff of an episode that is to go this way; `begin_s` is how long a beginning takes."""
    cutoff = Cutoff()
    match way:
        case Way.EXPERT if has_expert:
            return ExpertPolicy(), cutoff
        case Way.FAILING | Way.FAILING_LATE:
            return Mishap(_fail, num_calls=way is Way.FAILING_LATE), cutoff
        case Way.CUT:
            return Mishap(lambda: cutoff.cut(_REASON), num_calls=1), cutoff
        case Way.CUT_EARLY:
            cutoff.start(begin_s / 2, _REASON)
    return RandomPolicy(), cutoff


def _fail() -> None:
    raise PolicyError("the doctor fails this episode on purpose")
