"""The rule by which memory that all pages share is put down to one of them, with figures put in by hand."""

from __future__ import annotations

from typing import cast

import pytest

from palaestra.sandboxes.browser._chromium import Chromium
from palaestra.sandboxes.browser._tab import Tab
from palaestra.sandboxes.browser._watch import MemoryWatch

_MOST_MB = 1000.0


class _Page:
    """A page that says how much processor time it used, from one look to the next; None when it does not answer."""

    def __init__(self, *used_s: float | None) -> None:
        self._used_s = list(used_s)

    async def processor_s(self) -> float | None:
        return self._used_s.pop(0)


class _Clock:
    """Time that passes by a second with each look."""

    def __init__(self, step_s: float = 1.0) -> None:
        self._now_s, self._step_s = 0.0, step_s

    def monotonic(self) -> float:
        self._now_s += self._step_s
        return self._now_s


async def _looks(
    monkeypatch: pytest.MonkeyPatch, memory_mb: list[float], pages: list[_Page], step_s: float = 1.0
) -> tuple[list[int | None], bool]:
    """The number of the page that each look ends, and whether the browser counts as worn."""
    watch = MemoryWatch(cast(Chromium, None), _MOST_MB)
    monkeypatch.setattr(watch, "_measure", lambda: memory_mb.pop(0))
    monkeypatch.setattr("palaestra.sandboxes.browser._watch.time", _Clock(step_s))
    tabs = cast(list[Tab], pages)
    ended: list[int | None] = []
    for _ in range(len(memory_mb)):
        culprit = await watch.look(tabs)
        ended.append(None if culprit is None else tabs.index(culprit[0]))
        if culprit is not None:
            assert (culprit[1].by, culprit[1].ended) == ("page", "oom")
    return ended, watch.is_worn


async def test_the_busiest_since_half_was_full_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [_Page(50.0, 50.2), _Page(0.0, 0.9), _Page(3.0, 3.0)]
    assert await _looks(monkeypatch, [400.0, 600.0, 1100.0], pages) == ([None, None, 1], False)


async def test_a_page_that_does_not_answer_was_busy_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [_Page(0.0, 0.9), _Page(0.0, None)]
    assert await _looks(monkeypatch, [600.0, 1100.0], pages) == ([None, 1], False)


async def test_pages_that_did_nothing_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [_Page(0.0, 0.01), _Page(9.0, 9.02)]
    assert await _looks(monkeypatch, [600.0, 1100.0], pages) == ([None, None], False)


async def test_what_remains_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [_Page(0.0, 0.9, 0.9, 0.9), _Page(0.0, 0.1, 0.1, 0.8)]
    assert await _looks(monkeypatch, [600.0, 1100.0, 1100.0, 1300.0], pages) == ([None, 0, None, 1], False)


async def test_slow_growth_is_the_browsers_own_wear(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [_Page(0.0, 5.0, 5.0)]
    assert await _looks(monkeypatch, [600.0, 950.0, 1010.0], pages, step_s=61.0) == ([None, None, None], True)


async def test_memory_below_half_asks_no_page_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _looks(monkeypatch, [100.0, 499.0, 0.0], [_Page()]) == ([None, None, None], False)
