"""Rollout workers: play admitted groups, many episodes at once, and hand each finished group on.

Invariant: every issued group comes back exactly once, finished, however its episodes ended; at most
`(max_lag + 1) * groups_per_step` groups are issued and neither trained nor dropped, so with `max_lag` 0
generation waits for the learner (synchronous training) and above it runs ahead by that many steps.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from palaestra.agents import Policy, episode_seed, run_episode
from palaestra.envs import EnvSuite
from palaestra.errors import WorkerError
from palaestra.resources import Resources
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.sampler import TaskSampler
from palaestra.types import Episode, Group, Outcome, Task

OnGroup = Callable[[int, Group], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """How groups are played: counts of episodes and groups, the seed, and when failures stop the run."""

    group_size: int
    max_groups_in_hand: int
    concurrency: int
    seed: int
    max_failure_rate: float


class RolloutWorkers:
    """Owner of all running episodes. `run` plays until it is cancelled."""

    def __init__(
        self,
        suite: EnvSuite,
        policy: Policy,
        sampler: TaskSampler,
        ledger: Ledger,
        resources: Resources,
        plan: RolloutPlan,
        *,
        on_group: OnGroup,
    ) -> None:
        self._suite = suite
        self._policy = policy
        self._sampler = sampler
        self._ledger = ledger
        self._resources = resources
        self._plan = plan
        self._on_group = on_group
        self._slots = asyncio.Semaphore(plan.concurrency)
        self._room = asyncio.Condition()
        self._num_in_hand = 0
        self._failures = FailureWatch(plan.max_failure_rate)
        self.num_generating = 0
        self.num_generated = 0
        self.num_verified = 0

    async def run(self, resumed: Sequence[tuple[int, Task]] = (), *, num_waiting: int = 0) -> None:
        """Play `resumed` groups first, then new ones as there is room; `num_waiting` are already in hand."""
        self._num_in_hand = len(resumed) + num_waiting
        async with asyncio.TaskGroup() as tasks:
            for number, task in resumed:
                tasks.create_task(self._play_group(number, task), name=f"group {number}")
            while True:
                async with self._room:
                    await self._room.wait_for(lambda: self._num_in_hand < self._plan.max_groups_in_hand)
                    self._num_in_hand += 1
                number, task = self._sampler.draw()
                await self._ledger.issue(number, task)
                tasks.create_task(self._play_group(number, task), name=f"group {number}")

    async def release(self, count: int) -> None:
        """Say that `count` groups were trained or dropped: as many new ones may be played."""
        async with self._room:
            self._num_in_hand -= count
            self._room.notify_all()

    async def _play_group(self, number: int, task: Task) -> None:
        episodes: list[Episode | None] = [None] * self._plan.group_size
        async with asyncio.TaskGroup() as tasks:
            for position in range(self._plan.group_size):
                tasks.create_task(self._play_episode(number, position, task, episodes))
        group = Group(id=str(number), task=task, episodes=tuple(e for e in episodes if e is not None))
        await self._ledger.finish(number, group)
        await self._on_group(number, group)

    async def _play_episode(self, number: int, position: int, task: Task, episodes: list[Episode | None]) -> None:
        async with self._slots:
            self.num_generating += 1
            try:
                env = self._suite.make(task.env_id, resources=self._resources)
                seed = episode_seed(self._plan.seed, task, number * self._plan.group_size + position)
                episode = await run_episode(env, self._policy, task, episode_id=f"{number}.{position}", seed=seed)
            finally:
                self.num_generating -= 1
        episodes[position] = episode
        self.num_generated += 1
        self.num_verified += episode.reward is not None
        self._failures.see(episode)


class FailureWatch:
    """Kill switch: stops the run when too many of the last episodes failed on our side."""

    def __init__(self, max_rate: float, *, window: int = 64) -> None:
        self._max_rate = max_rate
        self._recent: deque[Episode] = deque(maxlen=window)

    def see(self, episode: Episode) -> None:
        """Count an episode; raises `WorkerError` once a full window has more failures than allowed."""
        self._recent.append(episode)
        failed = [e for e in self._recent if e.outcome in (Outcome.INFRA_ERROR, Outcome.UNSCORABLE)]
        if len(self._recent) == self._recent.maxlen and len(failed) > self._max_rate * len(self._recent):
            last = failed[-1].failure
            raise WorkerError(
                f"{len(failed)} of the last {len(self._recent)} episodes failed on our side; the last one, in "
                f"{failed[-1].env_id}: {last.kind if last else failed[-1].outcome}: {last.message if last else ''}"
            )
