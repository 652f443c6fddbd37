"""The process in which environments are probed: it has nothing else in hand, so that what stays is theirs.

Invariant: each call opens shared parts of its own and closes them before it answers.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from palaestra.agents import ExpertPolicy, Policy, RandomPolicy, episode_seed, run_episode
from palaestra.envs import Env, EnvLimits, EnvSuite, Registration, register
from palaestra.errors import PalaestraError, TaskError, WorkerError, leaves
from palaestra.processes import Reply
from palaestra.resources import Resources
from palaestra.trainer.doctor._census import Census, take_census
from palaestra.types import Episode, Task, ToolSpec

ValueT = TypeVar("ValueT")

_TIMED = ("begin", "verify", "end")
_NUM_ROUNDS = 2
_SETTLE_TRIES, _SETTLE_S = 30, 0.1


class ProbeSetup(NamedTuple):
    """What the child is built from. Environments that a user's module registered are registered again."""

    suite: EnvSuite
    registrations: tuple[Registration, ...]
    concurrency: int
    seed: int
    scratch: Path


class Played(NamedTuple):
    """Episodes of one policy in one environment; `seconds` are those of each begin, step, verify and end."""

    episodes: tuple[Episode, ...]
    tools: tuple[ToolSpec, ...]
    limits: EnvLimits
    seconds: dict[str, list[float]]
    wall_s: float
    is_expert: bool = False


class Stay(NamedTuple):
    """What was in hand: before anything, after each round of episodes (the first fills pools), after closing all."""

    before: Census
    rounds: tuple[Census, ...]
    after: Census
    episodes_per_round: int


def build(setup: ProbeSetup) -> ProbeService:
    """The service; temporary files of this process go to a folder that is counted."""
    tempfile.tempdir = str(setup.scratch)
    for known in setup.registrations:
        register(known.env_id, known.entry_point, family=known.family, summary=known.summary)
    return ProbeService(setup)


class ProbeService:
    """Plays one environment at a time."""

    def __init__(self, setup: ProbeSetup) -> None:
        self._setup = setup
        self._calls: dict[str, Callable[..., Coroutine[Any, Any, object]]] = {
            "play_well": self.play_well,
            "play_random": self.play_random,
        }

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Run the method of that name to its end; a group of errors answers as its first one."""
        try:
            reply.send(asyncio.run(self._calls[method](*args)))
        except ExceptionGroup as group:
            first = next(leaves(group))
            if isinstance(first, PalaestraError):
                raise first from group
            raise WorkerError(f"{type(first).__name__}: {first}") from group

    def work(self) -> bool:
        """Nothing happens between calls."""
        return False

    def close(self) -> None:
        """Nothing to release."""

    async def play_well(self, env_id: str, count: int) -> Played:
        """The scripted expert on the first `count` training tasks; random play where there is no expert."""
        policy: Policy = ExpertPolicy()
        try:
            self._setup.suite.make(env_id).expert()
        except TaskError:
            policy = RandomPolicy()
        async with Resources() as resources:
            played = await self._play(policy, env_id, range(count), resources)
        return played._replace(is_expert=isinstance(policy, ExpertPolicy))

    async def play_random(self, env_id: str, count: int) -> tuple[Played, Stay]:
        """Random calls on training tasks, round by round, with a census after each round and after the end."""
        scratch = self._setup.scratch
        # the first play of all imports modules and starts what lives as long as this process
        async with Resources() as resources:
            await self._play(RandomPolicy(), env_id, range(1), resources)
        before = await _settled(scratch)
        played: list[Played] = []
        rounds: list[Census] = []
        async with Resources() as resources:
            for number in range(1 + _NUM_ROUNDS):
                tasks = range(number * count, (number + 1) * count)
                played.append(await self._play(RandomPolicy(), env_id, tasks, resources))
                rounds.append(await _settled(scratch))
        after = await _settled(scratch)
        return _all_of(played), Stay(before, tuple(rounds), after, count)

    async def _play(self, policy: Policy, env_id: str, indices: range, resources: Resources) -> Played:
        suite, setup = self._setup.suite.split("train"), self._setup
        env = suite.make(env_id)
        num_tasks = env.num_tasks["train"]
        jobs = iter([(index, env.make_task("train", index % num_tasks)) for index in indices])
        watch = Stopwatch()
        episodes: list[Episode] = []
        started_s = time.monotonic()

        async def work(jobs: Iterator[tuple[int, Task]]) -> None:
            for index, task in jobs:
                played = suite.make(env_id, resources=resources)
                watch.attach(played)
                seed = episode_seed(setup.seed, task, index)
                episodes.append(await run_episode(played, policy, task, episode_id=f"{task.id}#{index}", seed=seed))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(setup.concurrency, len(indices))):
                group.create_task(work(jobs))
        seconds = watch.seconds
        seconds["step"] = [turn.env_s for episode in episodes for turn in episode.turns]
        return Played(tuple(episodes), env.tools, env.limits, dict(seconds), time.monotonic() - started_s)


class Stopwatch:
    """Times what an author wrote, in any number of environments."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def attach(self, env: Env) -> None:
        """Time this environment from now on."""
        for name in _TIMED:
            setattr(env, name, self._timed(name, getattr(env, name)))

    def _timed(
        self, name: str, method: Callable[..., Coroutine[Any, Any, ValueT]]
    ) -> Callable[..., Coroutine[Any, Any, ValueT]]:
        async def timed(*args: object) -> ValueT:
            started_s = time.monotonic()
            try:
                return await method(*args)
            finally:
                self.seconds[name].append(time.monotonic() - started_s)

        return timed


async def _settled(scratch: Path) -> Census:
    """A census when two in a row agree: what was just closed may take a moment to be gone."""
    gc.collect()
    last = take_census(scratch)
    for _ in range(_SETTLE_TRIES):
        await asyncio.sleep(_SETTLE_S)
        now = take_census(scratch)
        if _counts(now) == _counts(last):
            return now
        last = now
    return last


def _counts(census: Census) -> tuple[int, ...]:
    return census.processes, census.descriptors, census.leases, census.files


def _all_of(played: list[Played]) -> Played:
    seconds: dict[str, list[float]] = defaultdict(list)
    for each in played:
        for name, values in each.seconds.items():
            seconds[name].extend(values)
    episodes = tuple(episode for each in played for episode in each.episodes)
    return played[0]._replace(episodes=episodes, seconds=dict(seconds), wall_s=sum(each.wall_s for each in played))
