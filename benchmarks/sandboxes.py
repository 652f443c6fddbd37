"""Measure sandboxes against the plain tools, and browser tabs, and write `sandboxes.md`.

    python benchmarks/sandboxes.py [--repeats 60] [--backend jail --backend docker]

Latency and throughput at concurrency 1, 4 and 16: a Python snippet in the warm interpreter and in a new process,
making and closing a box, whole lifecycles, leases from a pool; beside them, in the same run and with the same
userland, what `bwrap`, `docker run` and `docker exec` take for the same snippet. Then browser contexts and steps.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import date
from pathlib import Path

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import check_backend
from palaestra.sandboxes._rootfs import PYTHON, ensure_rootfs
from palaestra.sandboxes.bench import CONCURRENCIES, Figure, measure, timed
from palaestra.sandboxes.browser import STRICT_POLICY, BrowserConfig, BrowserPool, Resource, Site, find_chromium
from palaestra.sandboxes.leases import list_leases

HERE = Path(__file__).parent
SNIPPET = "print(6 * 7)"
PAGE = b"<!DOCTYPE html><body>hello<script>function twice(x) { return 2 * x }</script></body>"
# what, back end, concurrency, median in ms at most
GOALS = (
    ("warm Python", "jail", 2.0),
    ("new Python", "jail", 8.0),
    ("warm Python", "docker", 4.0),
    ("new Python", "docker", 10.0),
    ("create", "jail", 60.0),
)
GOAL_LIFECYCLES = 25.0


async def run_plainly(*command: str) -> None:
    """One command, which must answer."""
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = await process.communicate()
    if stdout != b"42\n":
        raise SandboxError(f"{command[0]} did not answer: {stderr.decode(errors='replace')}")


async def measure_plain(name: str, command: tuple[str, ...], count: int) -> list[Figure]:
    """A command line at every concurrency."""

    async def once(_: int) -> None:
        await run_plainly(*command)

    await once(0)
    return [
        await timed(name, "new Python", once, concurrency, max(2, round(count / concurrency**0.5)))
        for concurrency in CONCURRENCIES
    ]


async def measure_bwrap(count: int) -> list[Figure]:
    """What a harness pays that starts bubblewrap for each execution."""
    box = ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL")
    places = ("--ro-bind", str(ensure_rootfs().path), "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp")
    return await measure_plain("plain `bwrap`", ("bwrap", *places, *box, PYTHON, "-c", SNIPPET), count)


async def measure_bare(count: int) -> list[Figure]:
    """The floor under every new Python: the same interpreter on the host, in no box at all."""
    python = os.path.join(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return await measure_plain("no box", (python, "-I", "-S", "-c", SNIPPET), count)


async def docker(*words: str) -> None:
    """A command of Docker's, which must go well."""
    process = await asyncio.create_subprocess_exec("docker", *words, stdout=subprocess.DEVNULL)
    if await process.wait():
        raise SandboxError(f"docker {words[0]} failed")


async def measure_docker(count: int) -> list[Figure]:
    """A container for each execution, and an execution in a container that runs."""
    image = f"palaestra/base:{ensure_rootfs().digest}"  # there since the docker back end was measured
    options = ("--network", "none", "--read-only", "--cap-drop", "ALL", "--log-driver", "none")
    name = f"palaestra-bench-{uuid.uuid4().hex[:8]}"
    once = ("docker", "run", "--rm", *options, image, PYTHON, "-c", SNIPPET)
    figures = await measure_plain("plain `docker run`", once, max(4, count // 6))
    await docker("run", "-d", "--rm", "--name", name, *options, image, "sleep", "600")
    try:
        again = ("docker", "exec", name, PYTHON, "-c", SNIPPET)
        return figures + await measure_plain("plain `docker exec`", again, max(4, count // 3))
    finally:
        await docker("rm", "-f", name)


async def measure_browser(count: int) -> list[Figure]:
    """Contexts (made, loaded, closed) and steps (a call into the page)."""
    origin = "http://bench.invalid"
    site = Site(f"{origin}/", {origin: {"/": Resource(PAGE, "text/html")}.get}, STRICT_POLICY)
    figures = []
    for num_ready, what in ((0, "fresh context: made, loaded, one step, closed"), (4, "the same from a stock of 4")):
        async with aclosing(await BrowserPool.start(site, BrowserConfig(num_ready=num_ready))) as pool:

            async def once(_: int, pool: BrowserPool = pool) -> None:
                async with pool.lease() as tab:
                    if await tab.call("twice", 21) != 42:
                        raise SandboxError("a page did not answer")

            await once(0)
            for concurrency in CONCURRENCIES:
                each = max(2, round(count / 3 / concurrency))
                figures.append(await timed("browser", what, once, concurrency, each))
    async with aclosing(await BrowserPool.start(site, BrowserConfig(num_ready=0))) as pool:
        for concurrency in CONCURRENCIES:
            tabs = [await pool.acquire() for _ in range(concurrency)]

            async def step(index: int, tabs: list = tabs) -> None:  # type: ignore[type-arg]
                await tabs[index].call("twice", 21)

            try:
                figures.append(await timed("browser", "step in a page", step, concurrency, 10 * count // concurrency))
            finally:
                for tab in tabs:
                    await pool.release(tab)
    return figures


def table(figures: list[Figure]) -> list[str]:
    """A row for each thing measured, a pair of columns for each concurrency."""
    lines = [
        "| what | where | at 1 | at 4 | at 16 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what in dict.fromkeys(figure.what for figure in figures):
        for name in dict.fromkeys(figure.backend for figure in figures if figure.what == what):
            found = {one.concurrency: one for one in figures if (one.what, one.backend) == (what, name)}
            cells = [cell(found[one]) if one in found else "" for one in CONCURRENCIES]
            lines.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return lines


def cell(figure: Figure) -> str:
    """Median, 90th percentile, and how many a second."""
    if figure.what in ("create", "close"):  # parts of a lifecycle, whose own rate says it
        return f"{figure.median_ms:.1f} ms (90 %: {figure.p90_ms:.1f})"
    return f"{figure.median_ms:.1f} ms (90 %: {figure.p90_ms:.1f}), {figure.per_s:.0f}/s"


def goals(figures: list[Figure]) -> list[str]:
    """Each goal beside what was measured."""
    lines = ["| goal | measured | met |", "| --- | --- | --- |"]
    for what, backend, most_ms in GOALS:
        for one in figures:
            if (one.what, one.backend, one.concurrency) == (what, backend, 1):
                is_met = "yes" if one.median_ms <= most_ms else "no"
                lines.append(f"| {what}, {backend}: {most_ms:g} ms | {one.median_ms:.1f} ms | {is_met} |")
    rates = [one.per_s for one in figures if (one.what, one.backend) == ("create, run, close", "jail")]
    if rates:
        is_met = "yes" if max(rates) >= GOAL_LIFECYCLES else "no"
        lines.append(f"| jail lifecycles: {GOAL_LIFECYCLES:g} a second | {max(rates):.0f} a second | {is_met} |")
    return lines


def ratios(figures: list[Figure]) -> list[str]:
    """What ours costs in terms of the plain tool."""
    at_one = {(one.backend, one.what): one.median_ms for one in figures if one.concurrency == 1}
    floor = at_one["no box", "new Python"]
    pairs = (("jail", "plain `bwrap`"), ("docker", "plain `docker exec`"), ("docker", "plain `docker run`"))
    lines = []
    for ours, plain in pairs:
        theirs = at_one.get((plain, "new Python"))
        for what in ("warm Python", "new Python"):
            if theirs and (ours, what) in at_one:
                times = theirs / at_one[ours, what]
                lines.append(f"- {what} in {ours}: {times:.1f} times as fast as {plain} for the same snippet.")
    for ours in ("jail", "docker"):
        if (ours, "new Python") in at_one:
            more_ms = at_one[ours, "new Python"] - floor
            lines.append(
                f"- new Python in {ours}: {more_ms:+.1f} ms against the same on the host in no box ({floor:.1f} ms)."
            )
    return lines


def page(figures: list[Figure], num_left: int, options: argparse.Namespace) -> str:
    """The result file."""
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    lines = [
        "# Sandboxes, measured",
        "",
        f"Made on {date.today()} by `python benchmarks/sandboxes.py --repeats {options.repeats}` on {os.cpu_count()}",
        f"cores, {platform.machine()}, Linux {platform.release()}, {load}. The snippet is `{SNIPPET}`;",
        "every answer was checked. Medians; a second figure is the throughput of all workers together. Warm is a box",
        "that is there, cold one that is made for the snippet: `create, run, close`.",
        "",
        "## Goals",
        "",
        *goals(figures),
        "",
        f"Leases on this machine's list afterwards: {num_left}.",
        "",
        "## Beside the plain tools",
        "",
        *ratios(figures),
        "",
        "## All figures, by concurrency",
        "",
        *table(figures),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60, help="measurements of each figure, at least 6")
    parser.add_argument("--backend", action="append", choices=("jail", "docker", "podman"), help="repeatable")
    options = parser.parse_args()
    if options.repeats < 6:
        sys.exit("--repeats must be at least 6")
    names = options.backend or [name for name in ("jail", "docker") if check_backend(name) is None]
    jobs: list[Callable[[], Awaitable[list[Figure]]]] = [lambda: measure_bare(options.repeats)]
    for name in names:
        jobs.append(lambda name=name: measure(name, repeats=options.repeats))  # type: ignore[misc]
        if name == "jail":
            jobs.append(lambda: measure_bwrap(options.repeats))
        if name == "docker" and shutil.which("docker"):
            jobs.append(lambda: measure_docker(options.repeats))
    try:
        find_chromium()
        jobs.append(lambda: measure_browser(options.repeats))
    except ConfigError as error:
        print(f"no browser figures: {error}", file=sys.stderr)
    figures: list[Figure] = []
    for job in jobs:
        figures += asyncio.run(collect(job))
    num_left = sum(lease.owner_pid == os.getpid() for lease in list_leases())
    (HERE / "sandboxes.md").write_text(page(figures, num_left, options))
    if num_left:
        sys.exit("some sandboxes were left")


async def collect(job: Callable[[], Awaitable[list[Figure]]]) -> list[Figure]:
    """One job in a loop of its own."""
    return await job()


if __name__ == "__main__":
    main()
