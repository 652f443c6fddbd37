"""What every back end gets on top: a queue in front, a list of leases, and refusal of what it cannot contain.

Invariants: no more boxes live, are made, or run at once than `Admission` says, the others wait their turn; a
box that exists is on the host's list; a spec that needs what the back end has not proved is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self

from pydantic import Field

from palaestra.config import Config
from palaestra.errors import ConfigError, SandboxError, ungrouped
from palaestra.sandboxes._limits import Capability, SandboxSpec
from palaestra.sandboxes._probe import probe
from palaestra.sandboxes._protocol import (
    MAX_TREE_BYTES,
    MAX_TREE_FILES,
    ExecResult,
    OnOutput,
    Sandbox,
    SandboxBackend,
    Snapshot,
    Usage,
)
from palaestra.sandboxes._records import Record

_CORES = len(os.sched_getaffinity(0))
_FORK_S = 60.0


_PROVED: dict[tuple[str, ...], dict[Capability, bool]] = {}
"""What was proved by this process, by the circumstances that decide it."""


class Admission(Config):
    """How much of a back end is in use at once; what comes beyond waits its turn."""

    max_boxes: int = Field(default=256, gt=0)
    """Boxes alive."""
    max_creating: int = Field(default=max(2, _CORES), gt=0)
    """Boxes being made."""
    max_running: int = Field(default=max(8, 4 * _CORES), gt=0)
    """Executions under way: on an overloaded machine the agent's code would run into limits that are not its fault."""
    queue_s: float = Field(default=600.0, gt=0)
    """Longest wait for a turn, in seconds."""


class RawBackend(Protocol):
    """What a kind of sandbox must be able to do by itself."""

    name: str

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """A fresh sandbox; raises `SandboxError`, or `ConfigError` when this machine cannot make any."""

    async def aclose(self) -> None:
        """Close every sandbox still open and release the back end; idempotent."""


class ManagedBackend:
    """A `SandboxBackend` around a raw one, which it owns."""

    def __init__(self, raw: RawBackend, admission: Admission, label: str = "") -> None:
        self.name = raw.name
        self._raw = raw
        self._admission = admission
        self._label = label or Path(sys.argv[0]).name
        self._alive = _Gate("boxes in use", admission.max_boxes, admission.queue_s)
        self._creating = _Gate("boxes being made", admission.max_creating, admission.queue_s)
        self._running = _Gate("executions under way", admission.max_running, admission.queue_s)
        self._proved: dict[Capability, bool] | None = None
        self._proving = asyncio.Lock()
        self._boxes: set[LeasedBox] = set()

    async def capabilities(self) -> frozenset[Capability]:
        """See `SandboxBackend.capabilities`."""
        return await self._prove(frozenset(Capability))

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """See `SandboxBackend.create`."""
        if spec.required:
            await self._refuse_missing(spec)
        queue_s = await self._alive.enter()
        try:
            async with self._creating.held() as waited_s:
                queue_s += waited_s
                box = await self._raw.create(spec)
            try:
                record = Record.write(
                    lease_id=box.id,
                    backend=self.name,
                    label=self._label,
                    handle=getattr(box, "handle", ""),
                    lifetime_s=spec.limits.lifetime_s,
                )
            except BaseException:
                await box.aclose()
                raise
        except BaseException:
            self._alive.leave()
            raise
        queue_s += getattr(box, "queue_s", 0.0)  # a remote box waited over there too
        leased = LeasedBox(box, record, self._alive, self._running, queue_s)
        self._boxes.add(leased)
        leased.on_closed = self._boxes.discard
        return leased

    async def aclose(self) -> None:
        """See `SandboxBackend.aclose`."""
        with ungrouped():
            try:
                async with asyncio.TaskGroup() as group:
                    for box in list(self._boxes):
                        group.create_task(box.aclose())
            finally:
                await self._raw.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _prove(self, wanted: frozenset[Capability]) -> frozenset[Capability]:
        async with self._proving:
            if self._proved is None:
                self._proved = await self._known()
            unknown = wanted - self._proved.keys()
            if unknown:
                told = getattr(self._raw, "capabilities", None)
                if told is None:
                    try:
                        self._proved |= await probe(self._raw, unknown)
                    except OSError as error:  # the attempts need a few sockets and processes of the host's
                        raise SandboxError(f"what a {self.name} box contains could not be tried: {error}") from error
                else:
                    known = await told()
                    self._proved |= {capability: capability in known for capability in Capability}
            return frozenset(capability for capability, is_there in self._proved.items() if is_there)

    async def _known(self) -> dict[Capability, bool]:
        """What this process has proved of a back end in the same circumstances; to be added to."""
        circumstances = getattr(self._raw, "circumstances", None)
        return {} if circumstances is None else _PROVED.setdefault(await circumstances(), {})

    async def _refuse_missing(self, spec: SandboxSpec) -> None:
        missing = sorted(spec.required - await self._prove(spec.required))
        if missing:
            raise ConfigError(
                f"the sandbox back end {self.name!r} does not provide {', '.join(missing)} on this machine, "
                "which is needed here; `palaestra doctor` lists what each back end provides"
            )


class LeasedBox:
    """A `Sandbox` that waits its turn, and is on the host's list until it is closed."""

    def __init__(self, box: Sandbox, record: Record, alive: _Gate, running: _Gate, queue_s: float) -> None:
        self.id = box.id
        self.queue_s = queue_s
        """Time that its creation waited for its turn, in seconds."""
        self._box = box
        self._record = record
        self._alive = alive
        self._running = running
        self._closing: asyncio.Future[None] | None = None
        self.on_closed: Callable[[LeasedBox], object] = lambda _: None

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
        on_output: OnOutput | None = None,
    ) -> ExecResult:
        """See `Sandbox.exec`."""
        async with self._running.held() as queue_s:
            result = await self._box.exec(argv, stdin=stdin, cwd=cwd, env=env, wall_s=wall_s, on_output=on_output)
        return replace(result, queue_s=result.queue_s + queue_s)

    async def run_python(
        self, code: str, *, stdin: bytes = b"", wall_s: float | None = None, on_output: OnOutput | None = None
    ) -> ExecResult:
        """See `Sandbox.run_python`."""
        async with self._running.held() as queue_s:
            result = await self._box.run_python(code, stdin=stdin, wall_s=wall_s, on_output=on_output)
        return replace(result, queue_s=result.queue_s + queue_s)

    async def read_file(self, path: str, *, offset: int = 0, max_bytes: int = 1 << 20) -> bytes:
        """See `Sandbox.read_file`."""
        return await self._box.read_file(path, offset=offset, max_bytes=max_bytes)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `Sandbox.write_file`."""
        await self._box.write_file(path, data, mode=mode)

    async def put_tree(self, files: Mapping[str, bytes] | bytes, path: str = "/workspace") -> None:
        """See `Sandbox.put_tree`."""
        await self._box.put_tree(files, path)

    async def get_tree(
        self, path: str = "/workspace", *, max_bytes: int = MAX_TREE_BYTES, max_files: int = MAX_TREE_FILES
    ) -> dict[str, bytes]:
        """See `Sandbox.get_tree`."""
        return await self._box.get_tree(path, max_bytes=max_bytes, max_files=max_files)

    async def snapshot(self) -> Snapshot:
        """See `Sandbox.snapshot`."""
        return await self._box.snapshot()

    async def restore(self, snapshot: Snapshot) -> None:
        """See `Sandbox.restore`."""
        await self._box.restore(snapshot)

    async def stats(self) -> Usage:
        """See `Sandbox.stats`."""
        return await self._box.stats()

    async def renew(self) -> None:
        """See `Sandbox.renew`."""
        await self._box.renew()
        self._record.renew()

    async def aclose(self) -> None:
        """See `Sandbox.aclose`."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._box.aclose()
            self._record.remove()  # one that could not be closed stays on the list, for the reaper
        finally:
            self._alive.leave()
            self.on_closed(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Gate:
    """A semaphore that tells how long one waited, and gives up with a reason."""

    def __init__(self, what: str, most: int, queue_s: float) -> None:
        self._what = what
        self._most = most
        self._queue_s = queue_s
        self._semaphore = asyncio.Semaphore(most)

    async def enter(self) -> float:
        """Wait for a place; the seconds it took. Raises `SandboxError` when none came free in time."""
        began_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._queue_s):
                await self._semaphore.acquire()
        except TimeoutError as error:
            raise SandboxError(
                f"all {self._most} {self._what} for {self._queue_s:g} s: close some, or raise the back end's Admission"
            ) from error
        return asyncio.get_running_loop().time() - began_s

    def leave(self) -> None:
        """Give the place back."""
        self._semaphore.release()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[float]:
        """A place for the length of the block; the seconds that it took to get it."""
        queue_s = await self.enter()
        try:
            yield queue_s
        finally:
            self.leave()


async def fork(backend: SandboxBackend, box: Sandbox, spec: SandboxSpec) -> Sandbox:
    """A second box with the same files, from which both go their own ways.

    Raises `SandboxError` when none is made within a minute: where every place is held by a box that is to be forked,
    none ever comes free.
    """
    snapshot = await box.snapshot()
    try:
        async with asyncio.timeout(_FORK_S) as scope:
            twin = await backend.create(spec)
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise SandboxError(
            f"no second box for a fork within {_FORK_S:g} s: the box it starts from, {box.id}, holds a place itself; "
            "close others, or raise Admission.max_boxes"
        ) from error
    try:
        await twin.restore(snapshot)
    except BaseException:
        with contextlib.suppress(SandboxError):
            await twin.aclose()
        raise
    return twin
