"""Ctrl-C, SIGTERM and a closed terminal while a run starts, trains and ends.

Invariant: while there is a step to finish, the first signal asks for that and the second leaves; before and after that
the first one leaves. Leaving happens once: no further signal cuts short what closes processes and folders.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """What the signals of one run mean at the moment."""

    def __init__(self, owner: asyncio.Task[object] | None) -> None:
        self._owner = owner
        self._stop: Callable[[], None] | None = None
        self._is_leaving = False

    @contextmanager
    def finishing(self, stop: Callable[[], None]) -> Iterator[None]:
        """In here the first signal calls `stop`."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def on_signal(self) -> None:
        """Take one signal."""
        if self._is_leaving:
            return
        if self._stop is not None:
            stop, self._stop = self._stop, None
            stop()
            with suppress(OSError):  # whoever read the error stream may have left
                print("stopping after this step; once more to leave now", file=sys.stderr, flush=True)
        elif self._owner is not None:
            self._is_leaving = True
            self._owner.cancel()


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Take the signals for the task that enters here; on the main thread, which alone may handle them."""
    taken = Interrupts(asyncio.current_task())
    if threading.current_thread() is not threading.main_thread():
        yield taken
        return
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in _NUMBERS}
    if previous[signal.SIGHUP] is signal.SIG_IGN:  # under nohup a closed terminal ends nothing
        del previous[signal.SIGHUP]
    for number in previous:
        loop.add_signal_handler(number, taken.on_signal)
    try:
        yield taken
    finally:
        for number, handler in previous.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
