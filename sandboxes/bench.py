"""Latency and throughput of a back end: what making, using and closing a box costs, alone and many at once.

Invariant: every figure is of boxes that were checked to have worked; one run measures all figures of a back end.
"""

from __future__ import annotations

import asyncio
import math
import resource
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes._backends import open_backend
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._pool import SandboxPool
from palaestra.sandboxes._protocol import ExecResult, Sandbox, SandboxBackend

CONCURRENCIES = (1, 4, 16)
_SPEC = SandboxSpec()
_OPEN_FILES = 512


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured: milliseconds of one, and how many a second went through."""

    backend: str
    what: str
    concurrency: int
    median_ms: float
    p90_ms: float
    per_s: float


def allow_open_files() -> None:
    """Let this process open as many files as a measurement needs; raises `ConfigError` where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        raise ConfigError(f"{hard} open files are too few to measure with: raise `ulimit -n` to {_OPEN_FILES} or more")
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, hard))


async def measure(name: str, *, repeats: int) -> list[Figure]:
    """All figures of a back end, each of `repeats` measurements for every one at once (at least two in all)."""
    figures = []
    began_s = time.perf_counter()
    backend = await open_backend(name, allow_unsafe=True, label="bench")
    try:
        await (await backend.create(_SPEC)).aclose()
        cold_ms = 1000 * (time.perf_counter() - began_s)
        figures.append(Figure(name, "first box of a process", 1, cold_ms, cold_ms, 1000 / cold_ms))
        for concurrency in CONCURRENCIES:
            count = max(1, round(repeats / concurrency**0.5))
            figures += await _measure_boxes(backend, concurrency, count)
            figures += await _measure_lifecycles(backend, concurrency, max(1, count // 2))
            figures.append(await _measure_leases(backend, concurrency, max(1, count // 2)))
    finally:
        await backend.aclose()
    return figures


async def _measure_boxes(backend: SandboxBackend, concurrency: int, count: int) -> list[Figure]:
    boxes = [await backend.create(_SPEC) for _ in range(concurrency)]
    kinds: dict[str, Callable[[Sandbox], Awaitable[ExecResult]]] = {
        "warm Python": lambda box: box.run_python("print(6 * 7)"),
        "new Python": lambda box: box.exec(["python3", "-c", "print(6 * 7)"]),
    }
    figures = []
    try:
        for what, run in kinds.items():

            async def once(index: int, run: Callable[[Sandbox], Awaitable[ExecResult]] = run) -> None:
                result = await run(boxes[index])
                if result.stdout != b"42\n":
                    raise SandboxError(f"a box of {backend.name} did not answer: {result}")

            for index in range(concurrency):  # the first in a box is slower
                await once(index)
            figures.append(await timed(backend.name, what, once, concurrency, count))
    finally:
        for box in boxes:
            await box.aclose()
    return figures


async def _measure_lifecycles(backend: SandboxBackend, concurrency: int, count: int) -> list[Figure]:
    made: dict[int, Sandbox] = {}
    create_s: list[float] = []
    close_s: list[float] = []

    async def once(index: int) -> None:
        began_s = time.perf_counter()
        made[index] = await backend.create(_SPEC)
        created_s = time.perf_counter()
        await made[index].run_python("print(6 * 7)")
        used_s = time.perf_counter()
        await made[index].aclose()
        create_s.append(created_s - began_s)
        close_s.append(time.perf_counter() - used_s)

    whole = await timed(backend.name, "create, run, close", once, concurrency, count)
    parts = [
        Figure(backend.name, what, concurrency, 1000 * statistics.median(times), 1000 * _p90(times), whole.per_s)
        for what, times in (("create", create_s), ("close", close_s))
    ]
    return [*parts, whole]


async def _measure_leases(backend: SandboxBackend, concurrency: int, count: int) -> Figure:
    async with SandboxPool(backend, _SPEC, concurrency) as pool:

        async def once(index: int) -> None:
            async with pool.lease() as box:
                await box.run_python("print(6 * 7)")

        return await timed(backend.name, "lease from a pool, run, close", once, concurrency, count)


async def timed(name: str, what: str, once: Callable[[int], Awaitable[None]], concurrency: int, count: int) -> Figure:
    """Call `once(worker)` `count` times in each of `concurrency` workers at once."""
    times: list[float] = []

    async def work(index: int) -> None:
        for _ in range(count):
            began_s = time.perf_counter()
            await once(index)
            times.append(time.perf_counter() - began_s)

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for index in range(concurrency):
            group.create_task(work(index))
    wall_s = time.perf_counter() - began_s
    return Figure(name, what, concurrency, 1000 * statistics.median(times), 1000 * _p90(times), len(times) / wall_s)


def _p90(times: list[float]) -> float:
    return sorted(times)[math.ceil(0.9 * (len(times) - 1))]
