"""Rollout workers: play admitted groups, many episodes at once, and hand each finished group on.

Invariant: a group and its episodes are in the ledger before the first of them is dispatched, each episode is there as
soon as it ended, and every issued group comes back exactly once, however its episodes ended. At most
`most_groups_in_hand` groups are issued and neither trained nor dropped, so with `max_lag` 0 generation
waits for the learner (synchronous training) and above it runs ahead by that many steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from palaestra.agents import Cutoff, Policy, cancelled_episode, episode_seed, run_episode
from palaestra.envs import EnvSuite
from palaestra.resources import Resources
from palaestra.trainer._failure_watch import FailureWatch
from palaestra.trainer.ledger import Ledger, OpenGroup
from palaestra.trainer.sampler import TaskSampler
from palaestra.types import Episode, Group, Outcome

OnGroup = Callable[[int, Group], Awaitable[None]]

_MAX_SIZE = 1 << 16

LATE, SPARE = "the group's deadline passed", "enough of the group ended before"


def most_groups_in_hand(*, groups_per_step: int, max_lag: int) -> int:
    """Groups that may be issued and neither trained nor dropped: a step's, once more for each version of lag."""
    return groups_per_step * (max_lag + 1)


def most_in_hand(*, group_size: int, groups_per_step: int, max_lag: int, num_spare: int = 0) -> int:
    """Episodes of all those groups, spare ones included: more than these are never played at once."""
    return most_groups_in_hand(groups_per_step=groups_per_step, max_lag=max_lag) * (group_size + num_spare)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """How groups are played: counts of episodes and groups, the seed, deadlines, and when failures stop the run.

    A group has `group_size` episodes and `num_spare` more, of which those still running are cut once `group_size`
    have an outcome that `is_valid` accepts, or `group_timeout_s` after the first began.
    """

    group_size: int
    max_groups_in_hand: int
    concurrency: int
    seed: int
    max_failure_rate: float
    max_invalid_rate: float
    group_timeout_s: float
    is_valid: Callable[[Outcome], bool]
    num_spare: int = 0


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
        self._changed = asyncio.Condition()
        self._num_in_hand = 0
        self._num_playing = 0
        self._failures = FailureWatch(plan.max_failure_rate, plan.max_invalid_rate, is_valid=plan.is_valid)
        self._running: dict[str, tuple[str, float]] = {}
        self.num_generated = 0
        """Episodes that ended in the life of the run; those with a reward are in `num_verified`."""
        self.num_verified = 0

    def count_on(self, *, num_generated: int, num_verified: int) -> None:
        """Take up the totals of the run's earlier lives."""
        self.num_generated = num_generated
        self.num_verified = num_verified

    @property
    def num_generating(self) -> int:
        """Episodes that are being played."""
        return len(self._running)

    def describe(self) -> list[str]:
        """The episodes that are being played, longest first, a line each."""
        now_s = time.monotonic()
        oldest = sorted(self._running.items(), key=lambda item: item[1][1])
        return [f"episode {name} of {task_id} for {now_s - since_s:.1f} s" for name, (task_id, since_s) in oldest]

    async def run(self, resumed: Sequence[OpenGroup] = (), *, num_waiting: int = 0) -> None:
        """Play `resumed` groups to their end, then new ones as there is room; `num_waiting` are already in hand."""
        self._num_in_hand = len(resumed) + num_waiting
        self._num_playing = len(resumed)
        async with asyncio.TaskGroup() as tasks:
            for group in resumed:
                tasks.create_task(self._play_group(group), name=f"group {group.number}")
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._num_in_hand < self._plan.max_groups_in_hand)
                    self._num_in_hand += 1
                    self._num_playing += 1
                number, task = self._sampler.draw()
                size = self._plan.group_size + self._plan.num_spare
                await self._ledger.issue(number, task, size)
                group = OpenGroup(number=number, task=task, size=size, ended={})
                tasks.create_task(self._play_group(group), name=f"group {number}")

    async def release(self, count: int) -> None:
        """Say that `count` groups were trained or dropped: as many new ones may be played."""
        async with self._changed:
            self._num_in_hand -= count
            self._changed.notify_all()

    async def drain(self) -> None:
        """Wait until every group that may be issued was issued and has finished."""
        async with self._changed:
            full = self._plan.max_groups_in_hand
            await self._changed.wait_for(lambda: self._num_playing == 0 and self._num_in_hand >= full)

    async def _play_group(self, group: OpenGroup) -> None:
        episodes = dict(group.ended)
        cutoff = Cutoff()
        self._cut_spares(cutoff, episodes)  # a run that was killed may have left nothing else to play
        try:
            async with asyncio.TaskGroup() as tasks:
                for position in range(group.size):
                    if position not in episodes:
                        tasks.create_task(
                            self._play_episode(group, position, cutoff, episodes),
                            name=f"episode {group.number}.{position} of {group.task.env_id}",
                        )
        finally:
            cutoff.close()
        played = tuple(episodes[position] for position in range(group.size))
        await self._ledger.finish(group.number)
        await self._on_group(group.number, Group(id=str(group.number), task=group.task, episodes=played))
        async with self._changed:
            self._num_playing -= 1
            self._changed.notify_all()

    async def _play_episode(
        self, group: OpenGroup, position: int, cutoff: Cutoff, episodes: dict[int, Episode]
    ) -> None:
        name = f"{group.number}.{position}"
        async with self._slots:
            if cutoff.reason is None:
                cutoff.start(self._plan.group_timeout_s, LATE)
                self._running[name] = (group.task.id, time.monotonic())
                try:
                    env = self._suite.make(group.task.env_id, resources=self._resources)
                    seed = episode_seed(self._plan.seed, group.task, group.number * _MAX_SIZE + position)
                    episode = await run_episode(
                        env, self._policy, group.task, episode_id=name, seed=seed, cutoff=cutoff
                    )
                finally:
                    del self._running[name]
            else:
                episode = cancelled_episode(group.task, episode_id=name, reason=cutoff.reason)
        await self._ledger.end(group.number, position, episode)
        episodes[position] = episode
        self._see(episode)
        self._cut_spares(cutoff, episodes)

    def _cut_spares(self, cutoff: Cutoff, ended: Mapping[int, Episode]) -> None:
        if sum(self._plan.is_valid(each.outcome) for each in ended.values()) >= self._plan.group_size:
            cutoff.cut(SPARE)

    def _see(self, episode: Episode) -> None:
        self.num_generated += 1
        self.num_verified += episode.reward is not None
        self._failures.see(episode)
