"""The remote back end: boxes on another machine, held by a server there (`palaestra.sandboxes.server`).

Covers: everything that the server's own back end contains; a client that dies (its boxes end within two seconds, as
its connections do), a network that goes away (they end with the lease), a server that dies (`SandboxError`, never a
result), other clients of the same server. Does not cover: eavesdroppers, unless the address is https or a tunnel.
Invariants: as long as this process lives, and no longer, it holds one call to the server open, and names its boxes in
every heartbeat; an execution that got no answer is never sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from typing import Self

from palaestra.errors import ConfigError, PalaestraError, SandboxError
from palaestra.sandboxes._frames import HOLD_S, PROTOCOL, TOKEN_VARIABLE, Header, raise_error
from palaestra.sandboxes._limits import Capability, SandboxSpec
from palaestra.sandboxes._remote_box import RemoteSandbox
from palaestra.sandboxes._remote_http import Connection

_BEATS_A_LEASE = 5
_AGAIN_S = 0.5
_PROBE_S = 600.0
_CREATE_S = 120.0
_CLOSE_S = 30.0


class RemoteBackend:
    """Makes boxes on a server. Belongs to the event loop it is used on, which must not stand still for a lease."""

    name = "remote"

    def __init__(self, url: str, token: str | None = None) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        client_id = secrets.token_hex(16)
        self._calls = Connection(url, token, client_id)
        self._pulse = Connection(url, token, client_id)  # apart, so that no flood of calls delays a heartbeat
        self._boxes: set[RemoteSandbox] = set()
        self._lock = asyncio.Lock()
        self._life: asyncio.Task[None] | None = None
        self._queue_s = 0.0
        self._closed = False

    async def capabilities(self) -> frozenset[Capability]:
        """See `SandboxBackend.capabilities`: what the server proved for its own back end."""
        await self._greet()
        header = await self._ask("capabilities", {}, _PROBE_S + self._queue_s)
        known = {member.value for member in Capability}
        return frozenset(Capability(name) for name in header.get("capabilities", ()) if name in known)

    async def create(self, spec: SandboxSpec) -> RemoteSandbox:
        """See `SandboxBackend.create`; raises `ConfigError` when the server refuses this client."""
        await self._greet()
        # only what was set: whether a limit was set by hand is part of a spec
        request = {"spec": spec.model_dump(mode="json", exclude_unset=True)}
        header = await self._ask("create", request, _CREATE_S + 2 * self._queue_s)
        key, queue_s = str(header.get("box")), float(header.get("queue_s", 0.0))
        box = RemoteSandbox(self._calls, key, spec, queue_s=queue_s, max_queue_s=self._queue_s)
        self._boxes.add(box)
        box.on_closed = self._boxes.discard
        if self._closed:
            with contextlib.suppress(SandboxError):
                await box.aclose()
            raise SandboxError("the remote back end is closed")
        return box

    async def aclose(self) -> None:
        """See `SandboxBackend.aclose`; raises `SandboxError` when boxes were open and the server did not answer."""
        if self._closed:
            return
        self._closed = True
        open_boxes, self._boxes = self._boxes, set()
        for box in open_boxes:
            box.forget()
        try:
            if self._life is not None:
                self._life.cancel()
                await asyncio.wait([self._life])
                await self._say_goodbye(bool(open_boxes))
        finally:
            await self._calls.aclose()
            await self._pulse.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _greet(self) -> None:
        async with self._lock:
            if self._closed:
                raise SandboxError("the remote back end is closed")
            if self._life is not None:
                return
            header = await self._ask("hello", {}, 0.0)
            if header.get("protocol") != PROTOCOL:
                raise ConfigError(
                    f"the sandbox server at {self._calls.url} speaks protocol {header.get('protocol')}, this client "
                    f"{PROTOCOL}: install the same version of palaestra on both sides"
                )
            self._queue_s = float(header["queue_s"])
            every_s = float(header["lease_s"]) / _BEATS_A_LEASE
            self._life = asyncio.create_task(self._live(every_s), name="sandbox signs of life")

    async def _live(self, every_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_alive(every_s))
            group.create_task(self._hold_on())

    async def _hold_on(self) -> None:
        while True:
            began_s = asyncio.get_running_loop().time()
            with contextlib.suppress(PalaestraError):  # whoever uses a box is told
                await self._pulse.call("hold", work_s=HOLD_S)
            if asyncio.get_running_loop().time() - began_s < _AGAIN_S:  # at once after one that held for a while
                await asyncio.sleep(_AGAIN_S)

    async def _keep_alive(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            alive = [box.key for box in self._boxes if not box.has_ended]
            if alive:
                with contextlib.suppress(PalaestraError):  # whoever uses a box is told
                    await self._pulse.call("heartbeat", {"boxes": alive})

    async def _say_goodbye(self, had_boxes: bool) -> None:
        try:
            await self._pulse.call("goodbye", {}, work_s=_CLOSE_S)
        except SandboxError:
            if had_boxes:
                raise

    async def _ask(self, op: str, request: Header, work_s: float) -> Header:
        header, _ = await self._calls.call(op, request, work_s=work_s)
        if "error" in header:
            raise_error(header)
        return header
