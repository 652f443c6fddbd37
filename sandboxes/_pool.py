"""Ready-made boxes, so that an episode does not wait for one.

Invariant: a box is leased once and closed after its lease; it never serves two leases. At most `size` boxes
are ready or being made, and `aclose` leaves none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Protocol

from palaestra.errors import ConfigError, PalaestraError, SandboxError, leaves
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._protocol import Sandbox

_TRIES = 5


class Maker(Protocol):
    """What the pool needs of a back end."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """See `SandboxBackend.create`."""


class SandboxPool:
    """Keeps up to `size` boxes of one spec ready, refilled in the background. Does not own the back end.

    Belongs to one event loop. `max_creating` boxes are made at a time; a lease waits for at most `wait_s`: longer than
    a back end's own queue by default, since its error says more.
    """

    def __init__(
        self, backend: Maker, spec: SandboxSpec, size: int, *, max_creating: int = 2, wait_s: float = 660.0
    ) -> None:
        if size < 1 or max_creating < 1:
            raise ValueError(f"size and max_creating must be at least 1, not {size} and {max_creating}")
        self._backend = backend
        self._spec = spec
        self._size = size
        self._num_makers = min(size, max_creating)
        self._wait_s = wait_s
        self._ready: deque[Sandbox] = deque()
        self._num_making = 0
        self._error: BaseException | None = None
        self._changed = asyncio.Condition()
        self._refill: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def num_ready(self) -> int:
        """Boxes that wait for a lease."""
        return len(self._ready)

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Sandbox]:
        """A fresh box for the length of the block.

        Raises `SandboxError` when making one failed or took too long, `ConfigError` when this machine cannot
        make any, and an error that no back end should raise as it is.
        """
        box = await self._take_alive()
        try:
            yield box
        finally:
            await box.aclose()

    async def aclose(self) -> None:
        """Stop refilling and close every ready box; leases in use close their own. Idempotent."""
        self._closed = True
        async with self._changed:
            self._changed.notify_all()
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.wait([self._refill])
        async with AsyncExitStack() as stack:  # one that cannot be closed does not keep the others open
            while self._ready:
                stack.push_async_callback(self._ready.popleft().aclose)

    async def __aenter__(self) -> SandboxPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _take_alive(self) -> Sandbox:
        """A box whose lifetime begins now; one that ended while it waited is replaced."""
        num_tries = _TRIES + len(self._ready)  # in an idle pool all of them may have outlived their lifetime
        for _ in range(num_tries):
            box = await self._take()
            try:
                await box.renew()
            except SandboxError as error:
                last = error
                with suppress(SandboxError):
                    await box.aclose()
            except BaseException:
                await box.aclose()
                raise
            else:
                return box
        raise SandboxError(f"{num_tries} sandboxes in a row ended before they were used: {last}") from last

    async def _take(self) -> Sandbox:
        if self._refill is None and not self._closed:
            self._refill = asyncio.create_task(self._keep_full(), name="sandbox pool refill")
        try:
            async with asyncio.timeout(self._wait_s), self._changed:
                await self._changed.wait_for(lambda: self._ready or self._error or self._closed)
                if self._closed:
                    raise SandboxError("the sandbox pool is closed")
                self._changed.notify_all()
                if self._ready:
                    return self._ready.popleft()
                error, self._error = self._error, None
        except TimeoutError as late:
            raise SandboxError(f"no sandbox within {self._wait_s:g} s; {self._state()}") from late
        assert error is not None  # what the wait was for, as no box is ready
        if isinstance(error, ConfigError) or not isinstance(error, PalaestraError | OSError):
            raise error
        raise SandboxError(f"cannot make a sandbox: {error}") from error

    def _state(self) -> str:
        alive = self._refill is not None and not self._refill.done()
        return f"{self._num_making} in the making, refill {'alive' if alive else 'dead'}"

    async def _keep_full(self) -> None:
        while not self._closed:
            try:
                async with asyncio.TaskGroup() as makers:
                    for _ in range(self._num_makers):
                        makers.create_task(self._make_boxes())
            except ExceptionGroup as group:  # an error that no back end should raise: for the next lease, as it is
                async with self._changed:
                    self._error = next(leaves(group))
                    self._changed.notify_all()

    async def _make_boxes(self) -> None:
        while not self._closed:  # a creation that is cancelled may end in an error of its own
            async with self._changed:
                await self._changed.wait_for(self._has_room)
                self._num_making += 1
            try:
                self._ready.append(await self._backend.create(self._spec))
            except (PalaestraError, OSError) as error:
                self._error = error  # one lease gets it, and then we try again
            finally:
                self._num_making -= 1
            async with self._changed:
                self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._error is None and len(self._ready) + self._num_making < self._size
