"""One lease of a tab: its line on the host's list, and the end of its lifetime."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable

from palaestra.sandboxes._records import Record
from palaestra.sandboxes.browser._tab import Tab

_numbers = itertools.count()


class TabLease:
    """Begins when it is made; calls `expire` once when its lifetime is over, unless it ended before."""

    def __init__(self, tab: Tab, label: str, lifetime_s: float, expire: Callable[[Tab], None]) -> None:
        self._tab = tab
        self._lifetime_s = lifetime_s
        self._expire = expire
        self._record = Record.write(
            lease_id=f"tab-{os.getpid()}-{next(_numbers)}",
            backend="browser",
            label=label,
            handle=f"tab {tab.chromium.id}",
            lifetime_s=lifetime_s,
        )
        self._timer = self._start()

    def renew(self) -> None:
        """Begin the lifetime anew."""
        self._timer.cancel()
        self._timer = self._start()
        self._record.renew()

    def end(self) -> None:
        """Take it off the list; idempotent."""
        self._timer.cancel()
        self._record.remove()

    def _start(self) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._lifetime_s, self._expire, self._tab)
