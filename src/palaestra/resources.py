"""Long-lived parts that many episodes share: a browser, a tool server, a pool of sandboxes.

Invariant: each part is started once per `Resources`, and closing closes every started part, newest first,
even when one of them fails to close. A part whose start is still under way at that moment is closed too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextlib import AsyncExitStack
from typing import Protocol, TypeVar, cast

from palaestra.errors import SandboxError


class AsyncClosable(Protocol):
    """Anything that must be closed on the loop it was started on."""

    async def aclose(self) -> None:
        """Release everything; idempotent."""


PartT = TypeVar("PartT", bound=AsyncClosable)


class Resources:
    """Owner of shared parts. Belongs to one event loop; use as an async context manager."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, AsyncClosable] = {}
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._stack = AsyncExitStack()
        self._is_closed = False

    async def get(self, key: Hashable, start: Callable[[], Awaitable[PartT]]) -> PartT:
        """The part called `key`, started with `start` by whoever asks first; the others wait for it.

        Raises `SandboxError` once everything has been closed.
        """
        async with self._locks.setdefault(key, asyncio.Lock()):
            if self._is_closed:
                raise SandboxError(f"{key!r} was asked for after its resources were closed")
            if key not in self._parts:
                part = await start()
                if self._is_closed:
                    await part.aclose()
                    raise SandboxError(f"the resources were closed while {key!r} started")
                self._parts[key] = part
                self._stack.push_async_callback(part.aclose)
            return cast(PartT, self._parts[key])

    def forget(self, key: Hashable, part: AsyncClosable | None = None) -> None:
        """Let the next `get` start the part anew, after it died. The dead one is still closed at the end.

        Given the dead `part`, a part that somebody else has started anew meanwhile is kept.
        """
        if part is None or self._parts.get(key) is part:
            self._parts.pop(key, None)

    async def aclose(self) -> None:
        """Close all parts, newest first; an error of one does not keep the others open."""
        self._is_closed = True
        self._parts.clear()
        await self._stack.aclose()

    async def __aenter__(self) -> Resources:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
