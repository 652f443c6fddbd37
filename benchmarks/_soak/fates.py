"""What may happen to a box, and how it must end then: what the agent did is a value, what we did is an error."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from palaestra.errors import SandboxError
from palaestra.sandboxes import Ended, Sandbox
from palaestra.sandboxes.leases import list_leases

SLEEP = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(60)"


class WrongError(Exception):
    """A lease ended otherwise than the rule says."""


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


_NEED_ISOLATION = {"kills all it can", "is forgotten", "is killed by the host"}


def fates_of(name: str) -> dict[str, int]:
    """What may happen to a sandbox of this kind, and how often."""
    if name == "browser":
        return BROWSER_FATES
    weights = {fate: weight for fate, (_, weight) in BOX_FATES.items()}
    return {fate: weights[fate] for fate in weights if name != "subprocess" or fate not in _NEED_ISOLATION}


class Deck:
    """Draws fates: each of them once, in a random order, and from then on by weight."""

    def __init__(self, weights: Mapping[str, int], by: random.Random) -> None:
        self._weights = dict(weights)
        self._random = by
        self._first = by.sample(sorted(weights), len(weights))

    def draw(self) -> str:
        """The next fate."""
        if self._first:
            return self._first.pop()
        return self._random.choices(list(self._weights), list(self._weights.values()))[0]


def expect(is_so: bool, result: object) -> None:
    """Raise `WrongError` unless a result is as it must be."""
    if not is_so:
        raise WrongError(str(result)[:400])
