"""The pool: ready boxes, each leased once, errors told, nothing left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import Sandbox, SandboxBackend, SandboxPool, SandboxSpec
from tests.sandboxes.hostview import eventually


class FlakyBackend:
    """A real back end whose next creations fail or hang on demand, and which remembers what it made."""

    name = "flaky"

    def __init__(self, inner: SandboxBackend) -> None:
        self.inner = inner
        self.num_failures = 0
        self.error: Exception = SandboxError("no room")
        self.hangs = False
        self.made: list[Sandbox] = []

    async def create(self, spec: SandboxSpec) -> Sandbox:
        if self.num_failures:
            self.num_failures -= 1
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()
        self.made.append(await self.inner.create(spec))
        return self.made[-1]

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_boxes_are_ready_and_never_reused(backend: SandboxBackend) -> None:
    async with SandboxPool(backend, SandboxSpec(), 2) as pool:
        ids = []
        for _ in range(4):
            async with pool.lease() as box:
                ids.append(box.id)
                result = await box.run_python("import os; print(os.listdir('/workspace')); open('x', 'w')")
                assert result.stdout == b"[]\n"
            with pytest.raises(SandboxError):
                await box.exec(["true"])
        assert len(set(ids)) == 4
        assert await eventually(lambda: pool.num_ready == 2, timeout_s=10)


async def test_concurrent_leases_get_different_boxes(backend: SandboxBackend) -> None:
    async with SandboxPool(backend, SandboxSpec(), 2) as pool:

        async def lease() -> str:
            async with pool.lease() as box:
                assert (await box.exec(["true"])).is_ok
                return box.id

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(lease()) for _ in range(5)]
        assert len({task.result() for task in tasks}) == 5


async def test_close_leaves_no_box(backend: SandboxBackend) -> None:
    flaky = FlakyBackend(backend)
    pool = SandboxPool(flaky, SandboxSpec(), 2)
    async with pool.lease():
        pass
    assert await eventually(lambda: pool.num_ready == 2, timeout_s=10)
    await pool.aclose()
    await pool.aclose()
    assert len(flaky.made) >= 3
    for box in flaky.made:
        with pytest.raises(SandboxError, match="closed"):
            await box.exec(["true"])
    with pytest.raises(SandboxError, match="pool is closed"):
        async with pool.lease():
            pass


async def test_refill_error_reaches_the_next_lease_and_the_pool_recovers(backend: SandboxBackend) -> None:
    flaky = FlakyBackend(backend)
    flaky.num_failures = 1
    async with SandboxPool(flaky, SandboxSpec(), 1) as pool:
        with pytest.raises(SandboxError, match="no room"):
            async with pool.lease():
                pass
        async with pool.lease() as box:
            assert (await box.exec(["true"])).is_ok


@pytest.mark.parametrize("error", [ConfigError("no bwrap here"), ZeroDivisionError("a bug of ours")])
async def test_what_is_no_failure_of_a_box_leaves_as_it_is_and_the_pool_recovers(
    backend: SandboxBackend, error: Exception
) -> None:
    flaky = FlakyBackend(backend)
    flaky.error, flaky.num_failures = error, 1
    async with SandboxPool(flaky, SandboxSpec(), 2) as pool:
        with pytest.raises(type(error)) as caught:
            async with pool.lease():
                pass
        assert caught.value is error
        async with asyncio.timeout(30), pool.lease() as box:
            assert (await box.exec(["true"])).is_ok


async def test_a_lease_has_a_deadline(backend: SandboxBackend) -> None:
    flaky = FlakyBackend(backend)
    flaky.hangs = True
    async with SandboxPool(flaky, SandboxSpec(), 1, wait_s=0.1) as pool:
        with pytest.raises(SandboxError, match=r"no sandbox within 0.1 s; 1 in the making"):
            async with pool.lease():
                pass


class Box:
    """Only what a pool does to a box."""

    id = "box"

    def __init__(self) -> None:
        self.has_expired = False
        self.cannot_close = False
        self.is_closed = False

    async def renew(self) -> None:
        if self.has_expired:
            raise SandboxError("its lifetime is over")

    async def aclose(self) -> None:
        if self.cannot_close:
            raise SandboxError("the daemon is gone")
        self.is_closed = True


class BoxMaker:
    """Makes such boxes at once, or never, and then fails to undo what it began."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.hangs = hangs
        self.made: list[Box] = []

    async def create(self, _: SandboxSpec) -> Any:
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                raise SandboxError("container could not be removed")
        self.made.append(Box())
        return self.made[-1]


async def test_a_pool_closes_though_a_creation_that_it_cancels_ends_in_an_error() -> None:
    pool = SandboxPool(BoxMaker(hangs=True), SandboxSpec(), 2, wait_s=0.05)
    with pytest.raises(SandboxError, match="no sandbox within"):
        async with pool.lease():
            pass
    async with asyncio.timeout(5):
        await pool.aclose()


async def test_a_lease_that_waits_when_the_pool_closes_is_told() -> None:
    pool = SandboxPool(BoxMaker(hangs=True), SandboxSpec(), 1)

    async def wait() -> None:
        async with pool.lease():
            pass

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await pool.aclose()
        with pytest.raises(SandboxError, match="pool is closed"):
            await waiting


async def test_a_box_that_cannot_be_closed_leaves_no_other_open() -> None:
    maker = BoxMaker()
    pool = SandboxPool(maker, SandboxSpec(), 4)
    async with pool.lease():
        pass
    assert await eventually(lambda: pool.num_ready == 4)
    maker.made[2].cannot_close = True
    with pytest.raises(SandboxError, match="the daemon is gone"):
        await pool.aclose()
    assert [box.is_closed for box in maker.made] == [True, True, False, True, True]


async def test_an_idle_pool_whose_boxes_all_expired_still_serves() -> None:
    maker = BoxMaker()
    async with SandboxPool(maker, SandboxSpec(), 16) as pool:
        async with pool.lease():
            pass
        assert await eventually(lambda: pool.num_ready == 16)
        old = maker.made[1:]
        for box in old:
            box.has_expired = True
        async with pool.lease() as fresh:
            assert id(fresh) not in {id(box) for box in old}
        assert all(box.is_closed for box in old)


async def test_a_cancelled_lease_closes_its_box(backend: SandboxBackend) -> None:
    flaky = FlakyBackend(backend)
    async with SandboxPool(flaky, SandboxSpec(), 1) as pool:
        held = asyncio.Event()

        async def hold() -> None:
            async with pool.lease():
                held.set()
                await asyncio.Event().wait()

        holder = asyncio.ensure_future(hold())
        await held.wait()
        holder.cancel()
        await asyncio.wait([holder])
        with pytest.raises(SandboxError, match="closed"):
            await flaky.made[0].exec(["true"])
