"""The checks of each environment: it plays, leaves nothing, answers in time, and its reward tells play apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from palaestra.trainer.doctor._check import Finding, ok, warning
from palaestra.trainer.doctor._env_worker import Played, Stay
from palaestra.trainer.doctor._environments import judge_latency, judge_play, judge_reward, judge_stay, used_mb
from palaestra.trainer.doctor._guard import MissingError, Part, Sheet
from palaestra.trainer.doctor._probe import EnvProbe
from palaestra.trainer.doctor._subject import NewModel, Subject

ROWS = ("environment", "reward", "latency", "leaks")
"""Names of the rows of every environment, which its id follows."""
ROW_OF_ALL = "environments"
"""The row that says which of them were not reached in time."""

_NUM_EXPERT, _NUM_FOR_VOCABULARY = 16, 80
_MAX_AT_ONCE = 64
_EXPERT_S, _ROUNDS_S = 60.0, 70.0
"""After which the episodes are judged that have ended."""
_JUDGE_S, _GRACE_S = 10.0, 50.0
_ALL_S = 240.0
"""How long the environments may take together; what is left then is not tried."""
_ROUND_S, _LEAST_ROUND = 4.0, 8
"""How long a round of random play should take, by the pace of the first ones, and its fewest episodes."""


class EnvironmentChecks:
    """Experts play first, because models are made and checked with what they say."""

    def __init__(self, subject: Subject, sheet: Sheet, probe: EnvProbe) -> None:
        self.conversations: Part[dict[str, Played]] = Part("episodes of the environments")
        self.memory_mb: Part[int] = Part("the environments' memory")
        self._subject = subject
        self._sheet = sheet
        self._probe = probe
        self._count = _NUM_FOR_VOCABULARY if isinstance(subject.model, NewModel) else _NUM_EXPERT
        self._at_once = at_once(subject)
        self._played: dict[str, Played] = {}
        self._stays: dict[str, Stay] = {}
        self._limit_s = _ALL_S
        self._ends_s = time.monotonic() + _ALL_S
        self._missed: dict[str, None] = {}

    async def run(self) -> None:
        """All rows of all environments, and the one that says what was not reached."""
        env_ids = self._subject.suite.env_ids
        working = [
            env_id
            for env_id in env_ids
            if await self._sheet.row(
                f"environment {env_id}", _EXPERT_S + _GRACE_S, self._timely(env_id, self._play_well)
            )
        ]
        self.conversations.settle(dict(self._played) or None)
        for env_id in env_ids:
            random: Part[Played] = Part("random play" if env_id in working else "the environment")
            if env_id not in working:
                random.settle(None)
            leaks = self._timely(env_id, partial(self._play_rounds, random=random))
            await self._sheet.row(f"leaks {env_id}", _ROUNDS_S + _GRACE_S, leaks)
            random.give_up()
            await self._sheet.row(f"latency {env_id}", _JUDGE_S, partial(self._latency, env_id, random))
            await self._sheet.row(f"reward {env_id}", _JUDGE_S, partial(self._reward, env_id, random))
        self.memory_mb.settle(sum(map(used_mb, self._stays.values())) if self._stays else None)
        await self._sheet.row(ROW_OF_ALL, _JUDGE_S, self._reached)

    def _timely(self, env_id: str, check: Callable[[str], Awaitable[Finding]]) -> Callable[[], Awaitable[Finding]]:
        """The check of one environment, within what is left of the time of all."""

        async def measure() -> Finding:
            left_s = self._ends_s - time.monotonic()
            scope = asyncio.timeout(max(left_s, 0.0))
            try:
                async with scope:
                    if left_s > 0:
                        return await check(env_id)
            except TimeoutError:
                if not scope.expired():
                    raise
            self._missed[env_id] = None
            raise MissingError(f"was not reached in the {self._limit_s:g} s that all environments have")

        return measure

    async def _reached(self) -> Finding:
        if self._missed:
            detail = f"not reached in {self._limit_s:g} s, wholly or in part: {', '.join(self._missed)}"
            return warning(detail, "free the machine, or let a file with fewer environments be checked")
        return ok("all were reached in time")

    async def _play_well(self, env_id: str) -> Finding:
        played = await self._probe.play_well(env_id, self._count, _EXPERT_S)
        self._played[env_id] = played
        return judge_play(played, self._subject.train.max_failure_rate)

    async def _play_rounds(self, env_id: str, random: Part[Played]) -> Finding:
        if random.is_missing:
            await random.get()  # says why
        played, stay = await self._probe.play_rounds(env_id, self._round_size(env_id), _ROUNDS_S)
        self._stays[env_id] = stay
        random.settle(played if played.episodes else None)
        return judge_stay(stay)

    async def _latency(self, env_id: str, random: Part[Played]) -> Finding:
        strange = await random.get()
        return judge_latency([self._played[env_id], strange], min(self._at_once, self._round_size(env_id)))

    async def _reward(self, env_id: str, random: Part[Played]) -> Finding:
        strange = await random.get()
        first = self._played[env_id]
        return judge_reward(first if first.is_expert else None, strange)

    def _round_size(self, env_id: str) -> int:
        """Episodes of a round: as many as the run plays at once, fewer where the first ones took long."""
        first = self._played[env_id]
        pace = len(first.episodes) / max(first.wall_s, 1e-3)
        return max(_LEAST_ROUND, min(self._at_once, int(pace * _ROUND_S)))


def at_once(subject: Subject) -> int:
    """Episodes that are probed at once: as many as in the run, as far as that is quick."""
    return min(subject.train.concurrency, _MAX_AT_ONCE)
