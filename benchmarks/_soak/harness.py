"""One harness process of the soak: it takes leases until its stdin ends, and tells of each in a line of JSON."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
from typing import Any

from benchmarks._soak.fates import BOX_FATES, Deck, WrongError, expect, fates_of
from benchmarks._soak.plants import plant

from palaestra.errors import SandboxError
from palaestra.sandboxes import Limits, SandboxBackend, SandboxSpec, open_backend
from palaestra.sandboxes.browser import STRICT_POLICY, BrowserConfig, BrowserPool, Resource, Site, Tab, TabError

WEIGHTS = {"jail": 6, "docker": 2, "podman": 2, "subprocess": 6, "browser": 2}
"""How often each sandbox is taken."""
_SPEC = SandboxSpec(limits=Limits(memory_mb=128, workspace_mb=32, wall_s=5.0))
_PAGE = b"<!DOCTYPE html><script>function twice(x) { return 2 * x } function loop() { for (;;); }</script>"


class Harness:
    """One process that takes leases until its stdin ends."""

    def __init__(self, seed: int, names: list[str], plant: str = "") -> None:
        """`plant` is what it leaves behind, to see that the soak finds it."""
        self._random = random.Random(seed)
        self._plant = plant
        self._decks = {name: Deck(fates_of(name), self._random) for name in names}
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
                    site = Site(f"{origin}/", {origin: {"/": Resource(_PAGE, "text/html")}.get}, STRICT_POLICY)
                    config = BrowserConfig(max_tabs=width, num_ready=0, call_timeout_s=1.0, max_restarts=10_000)
                    self._pool = await BrowserPool.start(site, config)
                else:
                    self._backends[name] = await open_backend(name, allow_unsafe=True, label="soak")
            async with asyncio.TaskGroup() as group:
                for _ in range(width):
                    group.create_task(self._take())
            if self._plant:
                plant(self._plant)
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
        fate = self._decks[name].draw()
        box = await self._backends[name].create(_SPEC)
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
        fate = self._decks["browser"].draw()
        num_kills = self._num_browser_kills
        try:
            async with self._pool.lease() as tab:
                say(lease="browser")
                await self._meet(fate, self._pool, tab)
        except TimeoutError as error:
            raise WrongError("the browser was killed, and no error told it") from error
        except SandboxError:
            if self._num_browser_kills == num_kills:
                raise
            return "is killed by the host"
        return fate

    async def _meet(self, fate: str, pool: BrowserPool, tab: Tab) -> None:
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
            os.kill(pool.pid, signal.SIGKILL)
            async with asyncio.timeout(5.0):
                while True:  # it may still answer once
                    await tab.call("twice", 21)
        else:
            expect(await tab.call("twice", 21) == 42, "a page did not answer")


def say(**values: Any) -> None:
    """Tell the soak something, in a line."""
    print(json.dumps(values), flush=True)
