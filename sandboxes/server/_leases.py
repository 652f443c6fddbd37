"""Which box is which client's, and since when it was not named.

Invariant: a box ends when its client closed it, hung up in the middle of something, lost its hold and gave no sign of
life for a moment, or has not named it for a lease; all end with `aclose`. An unknown key and another client's key are
the same error.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from palaestra.errors import SandboxError
from palaestra.sandboxes._protocol import Sandbox

_log = logging.getLogger(__name__)

_LET_GO_S = 1.25
"""A client that lost its hold may show itself for so long: connections break, and processes do not come back."""
_TICK_S = 0.25


@dataclass(slots=True, eq=False)
class Held:
    """One box of one client."""

    client: str
    key: str
    box: Sandbox
    named_s: float
    """When its client spoke of it last, on the loop's clock."""


class Leases:
    """All boxes of all clients. Use as an async context manager on the loop of the back end."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._held: dict[tuple[str, str], Held] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._holds: Counter[str] = Counter()
        self._let_go_s: dict[str, float] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, client: str, box: Sandbox) -> Held:
        """Take a box in; its key cannot be guessed."""
        held = Held(client, secrets.token_hex(20), box, _now_s())
        self._held[client, held.key] = held
        if self._closed:
            self.drop(held)
            raise SandboxError("the sandbox server is shutting down")
        return held

    def get(self, client: str, key: str) -> Held:
        """A box of this client, whose lease begins anew; raises `SandboxError` for any other."""
        held = self._held.get((client, key))
        if held is None:
            raise SandboxError(
                "the sandbox server does not hold this box: it was closed, its client was silent for longer than "
                f"the lease of {self.lease_s:g} s, or the server was restarted"
            )
        held.named_s = _now_s()
        return held

    def renew(self, client: str, keys: Iterable[str]) -> None:
        """Begin the leases of the named boxes anew; unknown ones are passed over."""
        for key in keys:
            if held := self._held.get((client, key)):
                held.named_s = _now_s()

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """A client's sign of life: it lasts as long as its connection, which the end of the client ends too.

        A block that runs to its end was not let go of: the client is about to take hold again.
        """
        self._holds[client] += 1
        self.heard(client)
        has_broken = True
        try:
            yield
            has_broken = False
        finally:
            self._holds[client] -= 1
            if not self._holds[client]:
                del self._holds[client]
                if has_broken:
                    self.let_go(client)

    def heard(self, client: str) -> bool:
        """Take note that a client lives; whether that was in doubt."""
        return self._let_go_s.pop(client, None) is not None

    def let_go(self, client: str) -> None:
        """Give a client without a hold a moment to show itself."""
        if client not in self._holds:
            self._let_go_s[client] = _now_s()

    def drop(self, held: Held) -> asyncio.Task[None] | None:
        """Forget a box and begin to close it; None when that is under way."""
        if self._held.pop((held.client, held.key), None) is None:
            return None
        task = asyncio.create_task(_close(held.box), name=f"close {held.box.id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def close(self, client: str, key: str) -> None:
        """Close one box and wait for it; one that is not held is closed already."""
        held = self._held.get((client, key))
        if held is not None and (task := self.drop(held)):
            await asyncio.shield(task)

    async def close_client(self, client: str) -> None:
        """Close all boxes of a client and wait for them."""
        await self._close_all([held for held in self._held.values() if held.client == client])

    async def __aenter__(self) -> Self:
        self._watch = asyncio.create_task(self._watch_leases(), name="sandbox leases")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self._close_all(list(self._held.values()))
        if self._closing:
            await asyncio.wait(self._closing)  # a box's own close has a deadline

    async def _close_all(self, boxes: list[Held]) -> None:
        tasks = [task for held in boxes if (task := self.drop(held))]
        if tasks:
            await asyncio.wait(tasks)

    async def _watch_leases(self) -> None:
        tick_s = min(_TICK_S, self.lease_s / 4)
        was_late = False
        while True:
            slept_s = _now_s()
            await asyncio.sleep(tick_s)
            now_s = _now_s()
            # while this loop stood still it heard nobody: what waits in its sockets is read before anyone is judged
            was_late = now_s - slept_s > 2 * tick_s and not was_late
            if was_late:
                continue
            gone = {client for client, since_s in self._let_go_s.items() if now_s - since_s > _LET_GO_S}
            for held in list(self._held.values()):
                if held.client in gone:
                    _log.warning("box %s ends: its client is gone", held.box.id)
                    self.drop(held)
                elif now_s - held.named_s > self.lease_s:
                    _log.warning("box %s ends: its client was silent for %g s", held.box.id, self.lease_s)
                    self.drop(held)
            for client in gone:
                del self._let_go_s[client]


async def _close(box: Sandbox) -> None:
    try:
        await box.aclose()
    except (SandboxError, OSError) as error:
        _log.error("box %s could not be closed: %s", box.id, error)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
