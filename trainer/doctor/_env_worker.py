"""The process in which environments are probed: it has nothing else in hand, so that what stays is theirs.

Invariant: each call opens shared parts of its own and closes them before it answers.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from palaestra.agents import EnginePolicy, episode_seed, run_episode
from palaestra.agents.renderers import open_renderer
from palaestra.envs import Env, EnvLimits, EnvSuite, Registration, register
from palaestra.errors import PalaestraError, TaskError, WorkerError, leaves
from palaestra.processes import Reply
from palaestra.resources import Resources
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor._census import Census, take_census
from palaestra.trainer.doctor._far_engine import FarEngine
from palaestra.trainer.doctor._footprints import Footprints
from palaestra.trainer.doctor._mishaps import WAYS, Way, arrange
from palaestra.trainer.doctor._variance import SampledGroups, sample_groups
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


class FarModel(NamedTuple):
    """A model whose engine the parent holds and serves at a socket."""

    path: str
    socket: Path
    max_model_len: int


class Played(NamedTuple):
    """Episodes of one policy in one environment; `seconds` are those of each begin, step, verify and end."""

    episodes: tuple[Episode, ...]
    tools: tuple[ToolSpec, ...]
    limits: EnvLimits
    seconds: dict[str, list[float]]
    wall_s: float
    is_expert: bool = False


class Stay(NamedTuple):
    """What was in hand: before anything, after each round of episodes (the first fills pools), after closing all.

    Rounds that did not end in time are missing. `num_scored` episodes were scored; `failure` is the first that nobody
    meant.
    """

    before: Census
    rounds: tuple[Census, ...]
    after: Census
    episodes_per_round: int
    num_scored: int
    failure: str = ""


def build(setup: ProbeSetup) -> ProbeService:
    """The service. From here on it is noted which files this process makes; temporary ones get their own folder."""
    tempfile.tempdir = str(setup.scratch)  # not TMPDIR: the list of leases stays the one of all sessions
    for known in setup.registrations:
        register(known.env_id, known.entry_point, family=known.family, summary=known.summary)
    return ProbeService(setup)


class ProbeService:
    """Plays one environment at a time."""

    def __init__(self, setup: ProbeSetup) -> None:
        self._setup = setup
        self._footprints = Footprints(setup.scratch)
        self._calls: dict[str, Callable[..., Coroutine[Any, Any, object]]] = {
            "play_well": self.play_well,
            "play_rounds": self.play_rounds,
            "sample_groups": self.sample_groups,
        }

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Run the method of that name to its end; a group of errors answers as its first one."""
        try:
            reply.send(asyncio.run(self._calls[method](*args)))
        except ExceptionGroup as group:
            first = next(leaves(group))
            if isinstance(first, PalaestraError):
                raise first from group
            traceback.print_exception(first)
            raise WorkerError(f"{type(first).__name__}: {first}") from group

    def work(self) -> bool:
        """Nothing happens between calls."""
        return False

    def close(self) -> None:
        """Nothing to release."""

    async def play_well(self, env_id: str, count: int, limit_s: float) -> Played:
        """The scripted expert on the first `count` training tasks, random play where there is no expert.

        After `limit_s` seconds it is what has ended; raises `WorkerError` when that is nothing.
        """
        has_expert = self._has_expert(env_id)
        way = Way.EXPERT if has_expert else Way.RANDOM
        async with Resources() as resources:
            played = await self._play(env_id, range(count), (way,), resources, limit_s=limit_s)
        if not played[way].episodes:
            raise WorkerError(f"no episode of {env_id} ended within {limit_s:g} s")
        return played[way]._replace(is_expert=has_expert)

    async def play_rounds(self, env_id: str, count: int, limit_s: float) -> tuple[Played, Stay]:
        """Rounds of episodes that go all ways, a census after each round and after the end; those of random calls.

        After `limit_s` seconds no further round begins, and one that runs is broken off.
        """
        ends_s = time.monotonic() + limit_s
        # the first play of all imports modules and starts what lives as long as this process
        async with Resources() as resources:
            first = await self._play(env_id, range(len(WAYS)), WAYS, resources, limit_s=limit_s)
        begin_s = float(np.median(first[Way.RANDOM].seconds.get("begin", [0.0])))
        before = await _settled(self._footprints)
        played: list[dict[Way, Played]] = []
        rounds: list[Census] = []
        async with Resources() as resources:
            for number in range(1 + _NUM_ROUNDS):
                tasks, left_s = range(number * count, (number + 1) * count), ends_s - time.monotonic()
                played.append(await self._play(env_id, tasks, WAYS, resources, begin_s=begin_s, limit_s=left_s))
                if sum(len(own.episodes) for own in played[-1].values()) < count:
                    break
                rounds.append(await _settled(self._footprints))
        after = await _settled(self._footprints)
        meant = [e for each in played for way in (Way.RANDOM, Way.EXPERT) for e in each[way].episodes]
        unmeant = [f"{e.failure.kind}: {e.failure.message}" for e in meant if e.failure is not None]
        stay = Stay(
            before,
            tuple(rounds),
            after,
            count,
            num_scored=sum(e.reward is not None for e in meant),
            failure=unmeant[0] if unmeant else "",
        )
        random = [each[Way.RANDOM] for each in played if each[Way.RANDOM].episodes]
        return _all_of(random or [first[Way.RANDOM]]), stay

    async def sample_groups(self, model: FarModel, config: GRPOConfig, limit_s: float) -> SampledGroups:
        """The run's first groups, a few, as it would play them; after `limit_s` seconds those that are there."""
        renderer = open_renderer(model.path, family=config.family)
        policy = EnginePolicy(FarEngine(model.socket, model.max_model_len), renderer, config.sampling)
        async with Resources() as resources:
            return await sample_groups(policy, self._setup.suite.split("train"), config, resources, limit_s)

    def _has_expert(self, env_id: str) -> bool:
        try:
            self._setup.suite.make(env_id).expert()
        except TaskError:
            return False
        return True

    async def _play(
        self,
        env_id: str,
        indices: range,
        ways: Sequence[Way],
        resources: Resources,
        *,
        limit_s: float,
        begin_s: float = 0.0,
    ) -> dict[Way, Played]:
        """Episodes on these tasks, the ways in turns; after `limit_s` seconds those that have ended."""
        suite, setup = self._setup.suite.split("train"), self._setup
        env, has_expert = suite.make(env_id), self._has_expert(env_id)
        num_tasks = env.num_tasks.get("train", 0)
        if num_tasks < 1:
            raise TaskError(f"{env_id} has no training tasks: give it a num_tasks['train'] of 1 or more")
        jobs = iter([(index, env.make_task("train", index % num_tasks)) for index in indices])
        watches = {way: Stopwatch() for way in ways}
        episodes: dict[Way, list[Episode]] = {way: [] for way in ways}
        started_s = time.monotonic()

        async def work(jobs: Iterator[tuple[int, Task]]) -> None:
            for index, task in jobs:
                way = ways[(index - indices.start) % len(ways)]  # so that all rounds are of one kind
                played = suite.make(env_id, resources=resources)
                watches[way].attach(played)
                policy, cutoff = arrange(way, has_expert=has_expert, begin_s=begin_s)
                seed = episode_seed(setup.seed, task, index)
                name = f"{task.id}#{index}"
                try:
                    episode = await run_episode(played, policy, task, episode_id=name, seed=seed, cutoff=cutoff)
                finally:
                    cutoff.close()
                episodes[way].append(episode)

        scope = asyncio.timeout(limit_s)
        try:
            async with scope, asyncio.TaskGroup() as group:
                for _ in range(min(setup.concurrency, len(indices))):
                    group.create_task(work(jobs))
        except TimeoutError:
            if not scope.expired():
                raise
        episode_s = (time.monotonic() - started_s) / max(sum(map(len, episodes.values())), 1)
        for way, watch in watches.items():
            watch.seconds["step"] = [turn.env_s for episode in episodes[way] for turn in episode.turns]
        return {
            way: Played(tuple(own), env.tools, env.limits, dict(watches[way].seconds), episode_s * len(own))
            for way, own in episodes.items()
        }


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


async def _settled(footprints: Footprints) -> Census:
    """A census when two in a row agree: what was just closed may take a moment to be gone."""
    gc.collect()
    last = take_census(footprints)
    for _ in range(_SETTLE_TRIES):
        await asyncio.sleep(_SETTLE_S)
        now = take_census(footprints)
        if _counts(now) == _counts(last):
            return now
        last = now
    return last


def _counts(census: Census) -> tuple[int, ...]:
    return census.processes, census.descriptors, census.threads, census.leases, census.files, len(census.strays)


def _all_of(played: list[Played]) -> Played:
    seconds: dict[str, list[float]] = defaultdict(list)
    for each in played:
        for name, values in each.seconds.items():
            seconds[name].extend(values)
    episodes = tuple(episode for each in played for episode in each.episodes)
    return played[0]._replace(episodes=episodes, seconds=dict(seconds), wall_s=sum(each.wall_s for each in played))
