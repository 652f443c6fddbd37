"""The replay buffer: played groups in the order they finished, until they are trained or dropped.

Invariant: a group leaves exactly once, trained or dropped with a reason, and no group whose oldest token is
more than `max_lag` versions behind the learner is ever handed out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from palaestra.types import Group


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that will not be trained, and why."""

    number: int
    reason: str


NumberedGroup: TypeAlias = tuple[int, Group]
"""A group and its number in the ledger."""


class ReplayBuffer:
    """Holds played groups. `objection` names why a group must not be trained whatever its age, or gives None."""

    def __init__(self, *, max_lag: int, objection: Callable[[Group], str | None]) -> None:
        self._max_lag = max_lag
        self._objection_to = objection
        self._groups: deque[NumberedGroup] = deque()
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._groups)

    async def put(self, number: int, group: Group) -> None:
        """Add a played group."""
        async with self._changed:
            self._groups.append((number, group))
            self._changed.notify_all()

    async def take(
        self, count: int, version: int, *, on_drop: Callable[[Dropped], Awaitable[None]]
    ) -> tuple[NumberedGroup, ...]:
        """The first `count` trainable groups to finish, ordered by number; waits for them.

        `on_drop` hears of each dropped group at once, so that a replacement is played meanwhile.
        """
        async with self._changed:
            while True:
                for drop in self._sift(version):
                    await on_drop(drop)
                if len(self._groups) >= count:
                    taken = [self._groups.popleft() for _ in range(count)]
                    # by number, so that the step does not depend on which of them was last
                    return tuple(sorted(taken, key=lambda each: each[0]))
                await self._changed.wait()

    def _sift(self, version: int) -> tuple[Dropped, ...]:
        kept: deque[NumberedGroup] = deque()
        dropped = []
        for number, group in self._groups:
            reason = self._objection(group, version)
            if reason is None:
                kept.append((number, group))
            else:
                dropped.append(Dropped(number, reason))
        self._groups = kept
        return tuple(dropped)

    def _objection(self, group: Group, version: int) -> str | None:
        reason = self._objection_to(group)
        if reason is not None:
            return reason
        if group.oldest_version is None:
            return "empty"
        return "stale" if version - group.oldest_version > self._max_lag else None
