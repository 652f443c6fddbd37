"""Looks at the memory that all leases of a browser share, and says whose page it was that filled it.

Blobs and stored things lie in the browser's own processes, outside any limit of a page: the kernel would take the
browser, and all its leases with it. Invariant: before it comes to that, one lease ends as the page's doing; and the
kernel takes a page's process first.
The rule: of the leases that were open when the memory passed half of what it may be, or a minute ago if that is
longer ago, the one whose page used most processor time since, where a page that does not answer counts as busy all
the time; a page that did next to nothing never. Memory that hardly grew in that minute is the browser's own wear.
Does not cover: memory that several pages fill together is put down to one of them after the other; a popup's
work counts as nobody's; a growth of gigabytes within a look's time, or of little in a minute, is left to the kernel.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping

from palaestra.sandboxes.browser._chromium import Chromium
from palaestra.sandboxes.browser._errors import TabError
from palaestra.sandboxes.browser._processes import is_renderer, offer_to_kernel, shared_memory_mb
from palaestra.sandboxes.browser._tab import Tab

_LEAST_MB = 256.0
_LEAST_SHARE = 0.05
_LEAST_GROWTH = 0.125
_WINDOW_S = 60.0


class MemoryWatch:
    """Of one browser. Call `look` again and again."""

    def __init__(self, chromium: Chromium, most_mb: float) -> None:
        self._chromium = chromium
        self._most_mb = max(_LEAST_MB, most_mb)
        self.is_worn = False
        """Whether the memory is full by nobody's doing, so that another browser should take over."""
        self._since_s = self._since_mb = 0.0
        self._used_s: dict[Tab, float] = {}
        self._offered: set[int] = set()

    async def look(self, tabs: Collection[Tab]) -> tuple[Tab, TabError] | None:
        """One of `tabs` that must end now, and why; None as a rule."""
        shared_mb = await asyncio.to_thread(self._measure)
        if shared_mb < self._most_mb / 2:
            self._used_s.clear()
            return None
        now_s = time.monotonic()
        if not self._used_s or (shared_mb < self._most_mb and now_s > self._since_s + _WINDOW_S):
            self._since_s, self._since_mb = now_s, shared_mb
            self._used_s = {tab: used or 0.0 for tab, used in (await _sample(tabs)).items()}
        elif shared_mb >= self._most_mb:
            if shared_mb - self._since_mb < _LEAST_GROWTH * self._most_mb:
                self.is_worn = True
                return None
            tab = self._busiest(await _sample(tabs), now_s - self._since_s)
            self._used_s.clear()  # what remains is measured anew
            what = f"the page filled {shared_mb:.0f} MB of the memory that all pages share, of {self._most_mb:.0f} MB"
            return None if tab is None else (tab, TabError(what, "page", "oom"))
        return None

    def _busiest(self, used_s: Mapping[Tab, float | None], took_s: float) -> Tab | None:
        busy_s = {tab: took_s if used is None else used - self._used_s.get(tab, 0.0) for tab, used in used_s.items()}
        tab = max(busy_s, key=lambda tab: busy_s[tab], default=None)
        return tab if tab is not None and busy_s[tab] >= _LEAST_SHARE * took_s else None

    def _measure(self) -> float:
        pids = self._chromium.family()
        for pid in _fresh(pids, self._offered):
            if is_renderer(pid):
                offer_to_kernel(pid)
                self._offered.add(pid)
        self._offered.intersection_update(pids)
        return shared_memory_mb(pids)


def _fresh(pids: Iterable[int], known: set[int]) -> list[int]:
    return [pid for pid in pids if pid not in known]


async def _sample(tabs: Collection[Tab]) -> dict[Tab, float | None]:
    async with asyncio.TaskGroup() as group:
        samples = {tab: group.create_task(tab.processor_s()) for tab in tabs}
    return {tab: sample.result() for tab, sample in samples.items()}
