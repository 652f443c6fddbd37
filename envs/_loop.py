"""One background event loop per process, on which the synchronous facade of every environment runs.

Invariant: a coroutine handed to `run` has finished, or was cancelled and awaited, when `run` returns.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from palaestra.resources import Resources

ValueT = TypeVar("ValueT")

_CANCEL_S = 10.0
"""How long an interrupted caller waits for the cancelled coroutine to clean up, in seconds."""


class _BackgroundLoop:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="palaestra-envs", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def run(self, coroutine: Coroutine[Any, Any, ValueT]) -> ValueT:
        has_ended = threading.Event()

        async def tracked() -> ValueT:
            try:
                return await coroutine
            finally:
                has_ended.set()

        future = asyncio.run_coroutine_threadsafe(tracked(), self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            has_ended.wait(_CANCEL_S)
            raise

    def close(self) -> None:
        if self.loop.is_running():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self.loop.close()


_background: _BackgroundLoop | None = None
_guard = threading.Lock()


def _forget_after_fork() -> None:
    """A forked child has the loop's state but not its thread: it must start its own."""
    global _background, _guard
    _background, _guard = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def run(coroutine: Coroutine[Any, Any, ValueT]) -> ValueT:
    """Run a coroutine on the background loop and wait for it; an interrupt cancels it."""
    global _background
    with _guard:
        if _background is None:
            _background = _BackgroundLoop()
    return _background.run(coroutine)


class _Shared:
    def __init__(self) -> None:
        self.resources = Resources()
        self.num_users = 0


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()


def join_shared_resources() -> Resources:
    """The running loop's default resources, for environments that were given none; `leave` once for each join."""
    shared = _shared.setdefault(asyncio.get_running_loop(), _Shared())
    shared.num_users += 1
    return shared.resources


async def leave_shared_resources() -> None:
    """Undo one join; the last one to leave closes everything."""
    loop = asyncio.get_running_loop()
    shared = _shared[loop]
    shared.num_users -= 1
    if shared.num_users == 0:
        del _shared[loop]
        await shared.resources.aclose()
