"""Running checks: each by its deadline, with whatever breaks it as its own row; and the rows as they come in.

Invariant: a check always gives a row, and only cancellation leaves it as an exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from palaestra.errors import PalaestraError, WorkerError, leaves
from palaestra.trainer.doctor._check import Check, Finding, failure, skipped
from palaestra.trainer.progress import Bar

ValueT = TypeVar("ValueT")


class MissingError(Exception):
    """What a check needs is not there: the check is skipped with this reason, another row says why."""


class Part(Generic[ValueT]):
    """Something that several checks need and that may fail to come about."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_settled = asyncio.Event()
        self._value: ValueT | None = None

    def settle(self, value: ValueT | None) -> None:
        """Hand it out, or let everybody know that it will not come."""
        self._value = value
        self._is_settled.set()

    def give_up(self) -> None:
        """Let everybody know that it will not come, if it has not come."""
        if not self._is_settled.is_set():
            self.settle(None)

    @property
    def is_missing(self) -> bool:
        """Whether it is known that it will not come."""
        return self._is_settled.is_set() and self._value is None

    async def get_or_none(self) -> ValueT | None:
        """The part, or None when it failed."""
        await self._is_settled.wait()
        return self._value

    async def get(self) -> ValueT:
        """The part, when it is there; raises `MissingError` when it failed."""
        value = await self.get_or_none()
        if value is None:
            raise MissingError(f"needs {self.name}, which failed or is not there")
        return value


async def guarded(name: str, deadline_s: float, measure: Callable[[], Awaitable[Finding]]) -> tuple[Check, bool]:
    """The row of one check, and whether it measured anything; `deadline_s` counts from now."""
    started_s, is_measured = time.monotonic(), False
    scope = asyncio.timeout(deadline_s)
    try:
        async with scope:
            finding = await measure()
        is_measured = True
    except MissingError as reason:
        finding = skipped(str(reason))
    except Exception as error:  # whatever breaks in one check (our parts, an author's environment) is its row
        if scope.expired():
            finding = failure(
                f"did not end within {deadline_s:g} s", "look into what it waits for, or free the machine"
            )
        else:
            finding = _broken(next(leaves(error)))
    seconds = time.monotonic() - started_s
    check = Check(name=name, verdict=finding.verdict, detail=finding.detail, remedy=finding.remedy, seconds=seconds)
    return check, is_measured


def _broken(error: BaseException) -> Finding:
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, WorkerError):
        return failure(told, "mend what it names; where a process was killed or late, free memory or cores")
    if isinstance(error, PalaestraError):
        return failure(told, "")  # such a message says itself what to do
    return failure(told, f"look for {type(error).__name__} in the code of the environment or module that raised it")


class Sheet:
    """Runs checks, keeps their rows, moves the bar."""

    def __init__(self, bar: Bar) -> None:
        self.rows: dict[str, Check] = {}
        self._bar = bar

    async def row(self, name: str, deadline_s: float, measure: Callable[[], Awaitable[Finding]]) -> bool:
        """Run one check by its deadline; whether it found something, however bad, instead of breaking."""
        check, is_measured = await guarded(name, deadline_s, measure)
        self.rows[name] = check
        self._bar.move_to(len(self.rows), f"{name}: {check.verdict}")
        return is_measured
