"""Take thousands of leases while harnesses, boxes and browsers are killed at random; look at what is left.

    python benchmarks/soak.py [--leases 5000] [--concurrency 32] [--seed 0] [--backend jail --backend docker] [--json]

Four harness processes share the leases. In each, what happens to a lease is drawn: the agent's code answers, leaves
daemons, runs out of time or memory, or kills all it can; the harness forgets it half-way; the host kills the box or
the browser. Every so often a whole harness gets SIGKILL and another one takes its place. Each lease must end as the
rule says: what the agent did is a value, what was done to it is an error of ours. After the last one the reaper
runs, and then nothing may be left: no process, container, mount, cgroup, temporary folder, record or browser context.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import Ended, Limits, Sandbox, SandboxBackend, SandboxSpec, check_backend, open_backend
from palaestra.sandboxes.browser import (
    STRICT_POLICY,
    BrowserConfig,
    BrowserPool,
    Resource,
    Site,
    TabError,
    find_chromium,
)
from palaestra.sandboxes.leases import list_leases, reap

HERE = Path(__file__).parent
NUM_HARNESSES = 4
LEASES_PER_KILL = 75
SETTLE_S = 20.0
WEIGHTS = {"jail": 6, "docker": 2, "podman": 2, "subprocess": 6, "browser": 2}
SPEC = SandboxSpec(limits=Limits(memory_mb=128, workspace_mb=32, wall_s=5.0))
PAGE = b"<!DOCTYPE html><script>function twice(x) { return 2 * x } function loop() { for (;;); }</script>"
PR_SET_CHILD_SUBREAPER = 36
SLEEP = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(60)"


class WrongError(Exception):
    """A lease ended otherwise than the rule says."""


# ---------------------------------------------------------------- what may happen to a box


async def answers(box: Sandbox) -> None:
    """The agent's code does its work."""
    result = await box.run_python("print(6 * 7)")
    expect(result.is_ok and result.stdout == b"42\n", result)


async def leaves_daemons(box: Sandbox) -> None:
    """It leaves processes of its own behind."""
    result = await box.exec(["sh", "-c", "setsid sleep 99 & setsid sleep 99 & true"])
    expect(result.is_ok and result.num_survivors == 2, result)


async def runs_out_of_time(box: Sandbox) -> None:
    """It sleeps on, whatever it is told."""
    expect((result := await box.run_python(SLEEP, wall_s=0.3)).ended is Ended.WALL_TIMEOUT, result)


async def runs_out_of_memory(box: Sandbox) -> None:
    """It takes more than it may."""
    result = await box.run_python("taken = bytearray(1 << 30)\nfor i in range(0, len(taken), 4096): taken[i] = 1")
    expect(result.ended is Ended.OOM or (result.ended is Ended.EXIT and result.exit_code == 1), result)


async def kills_all(box: Sandbox) -> None:
    """It kills every process that it may."""
    result = await box.exec(["sh", "-c", "kill -9 -1; kill -9 $$"])
    expect(not result.is_ok, result)


async def is_forgotten(box: Sandbox) -> None:
    """The harness stops waiting in the middle."""
    await until_begun(box, lambda running: running.cancel())


async def is_killed(box: Sandbox) -> None:
    """The host kills the box in the middle."""
    try:
        await until_begun(box, lambda _: kill(box))
    except SandboxError:
        return
    raise WrongError("the box was killed from outside, and no error told it")


async def is_never_used(box: Sandbox) -> None:
    """It is closed as it was made."""


async def until_begun(box: Sandbox, act: Callable[[asyncio.Task[Any]], object]) -> None:
    """Run something long, act on it once it says that it runs, and see it to its end."""
    begun = asyncio.Event()
    running = asyncio.ensure_future(box.exec(["python3", "-c", SLEEP], on_output=lambda *_: begun.set()))
    waiting = asyncio.ensure_future(begun.wait())
    await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    done = act(running)
    if asyncio.iscoroutine(done):
        await done
    with contextlib.suppress(asyncio.CancelledError):
        result = await running
        raise WrongError(f"it went on as if nothing had happened: {result}")


async def kill(box: Sandbox) -> None:
    """Kill a box from outside, by what the list of leases says of it."""
    kind, _, value = next(lease.handle for lease in list_leases() if lease.id == box.id).partition(" ")
    if kind == "container":
        killing = await asyncio.create_subprocess_exec(value, "kill", box.id, stdout=subprocess.DEVNULL)
        await killing.wait()
    else:
        os.kill(int(value.split(":")[1]), signal.SIGKILL)


BOX_FATES: dict[str, tuple[Callable[[Sandbox], Awaitable[None]], int]] = {
    "answers": (answers, 8),
    "leaves daemons": (leaves_daemons, 3),
    "runs out of time": (runs_out_of_time, 2),
    "runs out of memory": (runs_out_of_memory, 1),
    "kills all it can": (kills_all, 2),
    "is forgotten": (is_forgotten, 2),
    "is killed by the host": (is_killed, 2),
    "is never used": (is_never_used, 1),
}
BROWSER_FATES = {"answers": 16, "loops": 1, "is forgotten": 2, "is killed by the host": 1}


def expect(is_so: bool, result: object) -> None:
    """Raise `WrongError` unless a result is as it must be."""
    if not is_so:
        raise WrongError(str(result)[:400])


# ---------------------------------------------------------------- a harness


class Harness:
    """One process that takes leases until its stdin ends."""

    def __init__(self, seed: int, names: list[str]) -> None:
        self._random = random.Random(seed)
        self._names = names
        self._backends: dict[str, SandboxBackend] = {}
        self._pool: BrowserPool | None = None
        self._num_browser_kills = 0
        self._is_over = False

    async def run(self, width: int) -> None:
        """Take leases, `width` at once."""
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            for name in self._names:
                if name == "browser":
                    origin = "http://soak.invalid"
                    site = Site(f"{origin}/", {origin: {"/": Resource(PAGE, "text/html")}.get}, STRICT_POLICY)
                    config = BrowserConfig(max_tabs=width, num_ready=0, call_timeout_s=1.0, max_restarts=10_000)
                    self._pool = await BrowserPool.start(site, config)
                else:
                    self._backends[name] = await open_backend(name, allow_unsafe=True, label="soak")
            async with asyncio.TaskGroup() as group:
                for _ in range(width):
                    group.create_task(self._take())
            say(contexts=await self._pool.num_contexts() if self._pool else 0)
        finally:
            if self._pool is not None:
                await self._pool.aclose()
            for backend in self._backends.values():
                await backend.aclose()

    def _listen(self) -> None:
        sys.stdin.read()
        self._is_over = True

    async def _take(self) -> None:
        while not self._is_over:
            name = self._random.choices(self._names, [WEIGHTS[one] for one in self._names])[0]
            wrong = ""
            try:
                fate = await (self._use_tab() if name == "browser" else self._use_box(name))
            except (WrongError, SandboxError) as error:
                fate, wrong = "", f"{type(error).__name__}: {error}"
            say(done=[name, fate or "went wrong"], wrong=wrong)

    async def _use_box(self, name: str) -> str:
        fate = self._random.choices(list(BOX_FATES), [weight for _, weight in BOX_FATES.values()])[0]
        box = await self._backends[name].create(SPEC)
        say(lease=name)
        try:
            await BOX_FATES[fate][0](box)
        except (WrongError, SandboxError) as error:
            raise WrongError(f"{fate}: {error}") from error
        finally:
            await box.aclose()
        return fate

    async def _use_tab(self) -> str:
        assert self._pool is not None
        fate = self._random.choices(list(BROWSER_FATES), list(BROWSER_FATES.values()))[0]
        num_kills = self._num_browser_kills
        try:
            async with self._pool.lease() as tab:
                say(lease="browser")
                if fate == "loops":
                    try:
                        await tab.call("loop")
                        raise WrongError("an endless loop ended")
                    except TabError as error:
                        if error.by != "page":
                            raise
                elif fate == "is forgotten":
                    call = asyncio.ensure_future(tab.call("loop"))
                    await asyncio.wait([call], timeout=self._random.uniform(0.0, 0.1))
                    call.cancel()
                    await asyncio.wait([call])
                elif fate == "is killed by the host":
                    self._num_browser_kills += 1
                    os.kill(self._pool.pid, signal.SIGKILL)
                    async with asyncio.timeout(5.0):
                        while True:  # it may still answer once
                            await tab.call("twice", 21)
                else:
                    expect(await tab.call("twice", 21) == 42, "a page did not answer")
        except TimeoutError as error:
            raise WrongError("the browser was killed, and no error told it") from error
        except SandboxError:
            if self._num_browser_kills == num_kills:
                raise
            return "is killed by the host"
        return fate


def say(**values: Any) -> None:
    """Tell the soak something, in a line."""
    print(json.dumps(values), flush=True)


# ---------------------------------------------------------------- the soak


@dataclass
class Report:
    """What happened and what was left."""

    leases: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_harness_kills: int = 0
    num_finished: int = 0
    reaped: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    wall_s: float = 0.0


class Soak:
    """Starts, kills and replaces harnesses until enough leases were taken, then looks at what is left."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._random = random.Random(options.seed)
        self._selector = selectors.DefaultSelector()
        self._alive: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []
        self._mounts = mounts()
        self.report = Report()

    def run(self) -> Report:
        """The whole of it; harnesses end with it, whatever happens."""
        began_s = time.monotonic()
        try:
            for _ in range(NUM_HARNESSES):
                self._start()
            self._kill_until(self._options.leases)
            for harness in self._alive:
                assert harness.stdin is not None
                harness.stdin.close()
            while self._alive:
                self._listen()
        finally:
            for harness in self._alive:
                harness.kill()
        self.report.wall_s = time.monotonic() - began_s
        self.report.reaped = [f"{one.what}{': ' + one.error if one.error else ''}" for one in reap()]
        deadline_s = time.monotonic() + SETTLE_S
        while any((left := self._left()).values()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        self.report.left = left
        return self.report

    def _start(self) -> None:
        width = self._options.concurrency // NUM_HARNESSES
        seed = self._random.getrandbits(32)
        backends = [word for name in self._options.backend for word in ("--backend", name)]
        command = [sys.executable, "-P", __file__, "--harness", str(width), "--seed", str(seed), *backends]
        harness = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert harness.stdout is not None
        os.set_blocking(harness.stdout.fileno(), False)
        self._selector.register(harness.stdout, selectors.EVENT_READ, [harness, b""])
        self._alive.append(harness)
        self._pids.append(harness.pid)

    def _kill_until(self, count: int) -> None:
        next_kill = self._random.expovariate(1 / LEASES_PER_KILL)
        while self.report.leases.total() < count:
            self._listen()
            if self.report.leases.total() > next_kill:
                next_kill += self._random.expovariate(1 / LEASES_PER_KILL)
                self._random.choice(self._alive).kill()
                self.report.num_harness_kills += 1

    def _listen(self) -> None:
        events = self._selector.select(60.0)
        if not events:
            raise SystemExit("no harness has said anything for 60 s: the soak hangs")
        for key, _ in events:
            harness, before = key.data
            data = key.fileobj.read()  # type: ignore[union-attr]
            if data:
                *lines, key.data[1] = (before + data).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
            elif data == b"":
                self._bury(key.fileobj, harness)

    def _bury(self, stdout: Any, harness: subprocess.Popen[bytes]) -> None:
        self._selector.unregister(stdout)
        stdout.close()
        self._alive.remove(harness)
        assert harness.stdin is not None
        is_asked = harness.stdin.closed
        harness.stdin.close()
        code = harness.wait()
        if code == -signal.SIGKILL and not is_asked:
            self._start()
        elif code not in (0, -signal.SIGKILL):
            raise SystemExit(f"a harness ended with {code}")

    def _hear(self, told: dict[str, Any]) -> None:
        report = self.report
        if "lease" in told:
            report.leases[told["lease"]] += 1
        elif "done" in told:
            report.fates[": ".join(told["done"])] += 1
            if told["wrong"]:
                report.wrong.append(f"{told['done'][0]}: {told['wrong']}")
        else:
            report.num_finished += 1
            if told["contexts"]:
                report.wrong.append(f"{told['contexts']} browser contexts were left in a harness")

    def _left(self) -> dict[str, list[str]]:
        names = [f"palaestra-{pid}-" for pid in self._pids]
        cgroups = [
            os.path.join(parent, one)
            for parent, folders, _ in os.walk("/sys/fs/cgroup")
            for one in folders
            if any(name in one for name in names)
        ]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        # whatever was a harness's descendant is our child now
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        records = [lease.id for lease in list_leases()]
        return {
            "processes": [command_of(pid) for pid in children],
            "containers": [one for one in containers() if any(name in one for name in names)],
            "mounts": sorted(mounts() - self._mounts),
            "cgroups": cgroups,
            "records": records,
            "temporary folders": [
                path.name for path in self._folder.iterdir() if not path.name.startswith("palaestra-leases")
            ],
        }


def command_of(pid: str) -> str:
    """What a process was started as."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        words = b""
    return f"{pid} {words.decode(errors='replace')[:100]}"


def containers() -> list[str]:
    """Names of all containers of the engines of this machine."""
    names = []
    for engine in filter(shutil.which, ("docker", "podman")):
        command = [engine, "ps", "-a", "--format", "{{.Names}}"]
        names += subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return names


def mounts() -> set[str]:
    """Mount points of this machine, less those that container engines keep for others too."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return {point for point in points if not point.startswith(("/var/lib/", "/run/docker", "/run/containerd"))}


def available() -> list[str]:
    """What this machine can do."""
    names = [name for name in ("jail", "docker") if check_backend(name) is None]
    try:
        find_chromium()
    except ConfigError:
        return names
    return [*names, "browser"]


def page(report: Report, options: argparse.Namespace) -> str:
    """The result file."""
    total = report.leases.total()
    rate = f"{total / report.wall_s:.1f} a second"
    command = f"python benchmarks/soak.py --leases {options.leases} --concurrency {options.concurrency}"
    lines = [
        "# Thousands of leases with kills at random",
        "",
        f"Made on {date.today()} by `{command} --seed {options.seed}` on {os.cpu_count()} cores.",
        f"{total} leases in {report.wall_s:.0f} s ({rate}) from {NUM_HARNESSES} processes;",
        f"{report.num_harness_kills} times one of them was killed with SIGKILL and replaced.",
        "",
        "| sandbox | leases |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in sorted(report.leases.items())),
        "",
        "What happened to those whose harness was not killed meanwhile:",
        "",
        "| sandbox: fate | leases |",
        "| --- | --- |",
        *(f"| {fate} | {count} |" for fate, count in sorted(report.fates.items())),
        "",
        f"Ended against the rule: {len(report.wrong)}.",
        *(f"- {one}" for one in report.wrong[:20]),
        "",
        f"What killed harnesses had left for the reaper: {len(report.reaped)}"
        + (f" ({kinds(report.reaped)})." if report.reaped else "."),
        "",
        "Left after it: " + ", ".join(f"{len(found)} {what}" for what, found in report.left.items()) + ".",
        *(f"- {what}: {one}" for what, found in report.left.items() for one in found),
        "",
    ]
    return "\n".join(lines)


def kinds(reaped: list[str]) -> str:
    """How many of each kind were cleared."""
    counts = Counter(one.partition(" ")[0] for one in reaped)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leases", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", action="append", choices=sorted(WEIGHTS), help="repeatable; all by default")
    parser.add_argument("--json", action="store_true", help="print the report instead of writing the page")
    parser.add_argument("--harness", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.backend = options.backend or available()
    if not options.backend:
        sys.exit("nothing that this machine can run: see `palaestra doctor`")
    if options.harness:
        asyncio.run(Harness(options.seed, options.backend).run(options.harness))
        return
    if options.concurrency < NUM_HARNESSES:
        sys.exit(f"--concurrency must be at least {NUM_HARNESSES}")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ.pop("XDG_RUNTIME_DIR", None)
        report = Soak(options, Path(folder)).run()
    if options.json:
        print(json.dumps(vars(report)))
    else:
        (HERE / "soak.md").write_text(page(report, options))
    if report.wrong or any(report.left.values()):
        sys.exit("some leases ended against the rule or left something")


if __name__ == "__main__":
    main()
