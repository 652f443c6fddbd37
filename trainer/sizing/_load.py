"""Load on the parts for a while: episodes played, or single requests sent, by so many slots at a time.

Invariant: a load ends by its deadline; what is unfinished then is cancelled and counts in the engine's tokens alone.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from palaestra.agents import Engine, Policy, Sampling, episode_seed, run_episode
from palaestra.envs import EnvSuite
from palaestra.errors import WorkerError
from palaestra.resources import Resources
from palaestra.trainer._proc import cpu_seconds, descendants, machine_seconds, tree_seconds
from palaestra.trainer.learner import Learner
from palaestra.types import Episode

Slot = Callable[[], Coroutine[Any, Any, None]]
"""Goes on until it is cancelled."""

_ENOUGH = 2
_MOST_FAILED = 16
_WARM_UP_SHARE = 0.15
"""Of a load's seconds: its slots start together, and together they do nothing but read their prompts."""


class EngineProcess(Engine, Protocol):
    """An engine in a process of its own."""

    @property
    def pid(self) -> int:
        """That process."""


class LearnerProcess(Learner, Protocol):
    """A learner in a process of its own."""

    @property
    def pid(self) -> int:
        """That process."""


@dataclass(slots=True)
class Watched:
    """What happened while something ran: seconds, tokens sampled by the engine, cores in use by process."""

    seconds: float = 0.0
    tokens: int = 0
    cores: Mapping[str, float] = field(default_factory=dict)
    driver_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


class Watch:
    """Counts tokens and processor seconds between two moments."""

    def __init__(self, engine: EngineProcess, learner: LearnerProcess) -> None:
        self._engine = engine
        self._learner = learner

    @asynccontextmanager
    async def during(self) -> AsyncIterator[Watched]:
        """Fill the watched values in when the context is left without an error."""
        watched = Watched()
        started_s, before, tokens = time.monotonic(), self._processors(), (await self._engine.stats()).tokens
        yield watched
        watched.tokens = (await self._engine.stats()).tokens - tokens
        watched.seconds = time.monotonic() - started_s
        after = self._processors()
        # what started or ended meanwhile can make a difference negative
        used_s = {name: max(0.0, after[name] - before[name]) for name in after}
        watched.driver_s = used_s["driver"]
        watched.cores = {name: round(seconds / max(watched.seconds, 1e-9), 3) for name, seconds in used_s.items()}

    def _processors(self) -> dict[str, float]:
        engine, learner, own = self._engine.pid, self._learner.pid, os.getpid()
        services = descendants(own, without=(engine, learner))
        ours = {
            "engine": tree_seconds(engine),
            "learner": tree_seconds(learner),
            "driver": cpu_seconds(own),
            "environments": sum(cpu_seconds(pid) for pid in services),
        }
        return ours | {"others": machine_seconds() - sum(ours.values())}


class Player:
    """Plays episodes as training does: tasks from the suite's stream, `group_size` times each."""

    def __init__(self, suite: EnvSuite, policy: Policy, resources: Resources, *, group_size: int, seed: int) -> None:
        self._suite = suite
        self._policy = policy
        self._resources = resources
        self._group_size = group_size
        self._seed = seed
        self._next_number = 0
        self._num_failed = 0

    async def play(self, watch: Watch, *, slots: int, seconds: float) -> tuple[list[Episode], Watched]:
        """Episodes that ended within `seconds`, with `slots` of them always under way, and what was watched.

        Given are those that began before the first that did not end: of all that ended, the short ones are too many.
        """
        ended: dict[int, Episode] = {}
        first = self._next_number
        numbers = itertools.count(first)

        async def keep_playing() -> None:
            while True:
                number = next(numbers)
                ended[number] = await self._play_one(number)
                self._watch_failures(ended[number])
                await asyncio.sleep(0)  # episodes that fail at once would leave nobody else a turn

        watched = await _for_a_while([keep_playing] * slots, watch, seconds)
        self._next_number = next(numbers)
        unbiased = list(itertools.takewhile(ended.__contains__, itertools.count(first)))
        chosen = unbiased if len(unbiased) >= _ENOUGH else sorted(ended)
        return [ended[number] for number in chosen], watched

    def _watch_failures(self, episode: Episode) -> None:
        self._num_failed = self._num_failed + 1 if episode.failure is not None else 0
        if episode.failure is not None and self._num_failed >= _MOST_FAILED:
            reason = f"{episode.failure.kind}: {episode.failure.message}"
            raise WorkerError(f"{self._num_failed} episodes in a row failed on our side, in {episode.env_id}: {reason}")

    async def _play_one(self, number: int) -> Episode:
        task = self._suite.draw(number // self._group_size, seed=self._seed)
        env = self._suite.make(task.env_id, resources=self._resources)
        seed = episode_seed(self._seed, task, number)
        return await run_episode(env, self._policy, task, episode_id=str(number), seed=seed)


async def send_requests(
    engine: EngineProcess,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    watch: Watch,
    *,
    slots: int,
    seconds: float,
) -> Watched:
    """Keep `slots` requests under way for `seconds`, going round the prompts."""
    numbers = itertools.count()

    async def keep_asking() -> None:
        while True:
            number = next(numbers)
            await engine.generate(prompts[number % len(prompts)], sampling, stop_ids=stop_ids, seed=number)

    return await _for_a_while([keep_asking] * slots, watch, seconds)


async def _for_a_while(slots: Sequence[Slot], watch: Watch, seconds: float) -> Watched:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(slot()) for slot in slots]
        await asyncio.sleep(_WARM_UP_SHARE * seconds)
        async with watch.during() as watched:
            await asyncio.sleep((1.0 - _WARM_UP_SHARE) * seconds)
        for task in running:
            task.cancel()
    return watched
