"""A stage that was played on is as a fresh one once the next task is set up, so one lease serves many episodes.

An agent reaches a page by `palaestra.act` alone: it clicks, types text and selects options. So what may survive is
what the pages' own scripts leave behind: everything that a script can find is compared with a fresh context's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from palaestra.envs.browser._pages import PAGES
from palaestra.envs.browser._shelf import TabShelf
from palaestra.envs.browser._stage import stage_site
from palaestra.errors import SandboxError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Tab

_STATE = Path(__file__).with_name("state.js").read_text()
_PAGES_AT_ONCE = 8
_KINDS = {"textbox": "type", "searchbox": "type", "combobox": "select", "listbox": "select"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(chromium: None) -> AsyncIterator[BrowserPool]:
    pool = await BrowserPool.start(
        stage_site(PAGES), BrowserConfig(num_ready=2, frames_on_request=True)
    )  # as MiniWoB's is
    yield pool
    await pool.aclose()


async def _play_half(tab: Tab, page: str) -> int:
    """Act on half of the page's controls, the way an agent does; how many acts changed what it sees."""
    reply = await tab.call("palaestra.begin", page, "5", False)
    first, controls = reply["rows"], [row for row in reply["rows"] if row[3]]
    num_changes = 0
    for _, role, _, ref, states, _ in controls[: (len(controls) + 1) // 2]:
        kind = _KINDS.get(role, "click")
        text = "leak" if kind == "type" else (states.get("options") or [""])[-1]
        answer = await tab.call("palaestra.act", kind, ref, text)
        num_changes += answer.get("rows", first) != first
    return num_changes


async def _begin(tab: Tab, page: str) -> tuple[Any, list[str]]:
    return await tab.call("palaestra.begin", page, "7", False), await tab.call("eval", _STATE)


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("start", range(0, len(PAGES), _PAGES_AT_ONCE))
async def test_after_half_an_episode_the_next_task_is_as_in_a_fresh_context(pool: BrowserPool, start: int) -> None:
    num_changed, order = 0, [*PAGES, PAGES[0]][start : start + _PAGES_AT_ONCE + 1]
    async with pool.lease() as used:
        for page, following in pairwise(order):
            num_changed += await _play_half(used, page) > 0
            reply, state = await _begin(used, following)
            async with pool.lease() as fresh:
                fresh_reply, fresh_state = await _begin(fresh, following)
            assert reply == fresh_reply, page
            assert len(state) > 20_000
            assert set(state) ^ set(fresh_state) == set(), f"{page}, then {following}"
            assert state == fresh_state, f"{page}, then {following}"
    assert num_changed > len(order) // 2  # half an episode does leave marks


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "mark",
    [
        "Array.prototype.leak = 1",
        "Math.floor = () => 0",
        "Element.prototype.click = () => {}",
        "EventTarget.prototype.dispatchEvent = () => {}",
        "document.title = 'leak'",
        "document.head.append(document.createElement('style'))",
        "jQuery.fn.leak = 1",
        "history.replaceState('leak', '')",
    ],
)
async def test_the_comparison_sees_marks_that_survive(pool: BrowserPool, mark: str) -> None:
    async with pool.lease() as fresh:
        _, before = await _begin(fresh, "login-user")
        await fresh.call("eval", f"{mark}; 1")
        assert set((await _begin(fresh, "login-user"))[1]) ^ set(before)


@pytest.mark.asyncio(loop_scope="module")
async def test_not_even_marks_that_no_agent_can_make_survive(pool: BrowserPool) -> None:
    tab = await pool.acquire()
    await tab.call("palaestra.begin", "login-user", "3", True)
    marks = (
        "setInterval(() => { globalThis.leak = (globalThis.leak || 0) + 1 }, 10); setTimeout('leak = 1', 10);"
        "document.addEventListener('click', () => { globalThis.leak = 1 }); core.leak = 1; window.onload = null;"
        "document.body.insertAdjacentHTML('beforeend', '<button>leak</button>'); document.title = 'leak';"
        "ui_utils.FIFTY_NAMES = ['leak']; WOB_REWARD_GLOBAL = 9; globalThis.leaked = 1; 1"
    )
    await tab.call("eval", marks)
    await tab.call("palaestra.act", "type", 1, "leak")
    reply = await tab.call("palaestra.begin", "login-user", "3", True)
    await tab.call("palaestra.act", "click", 1, "")
    left = await tab.call("eval", "[typeof leak, typeof leaked, core.leak, WOB_REWARD_GLOBAL, document.body.innerText]")
    await pool.release(tab)
    assert "leak" not in str(reply)
    assert left[:2] == ["undefined", "undefined"]
    assert left[2] is None
    assert left[3] == 0
    assert "leak" not in str(left)


async def test_shelf_bounds_reuses_and_wears_out_its_tabs(chromium: None) -> None:
    config = BrowserConfig(max_tabs=2, num_ready=0, episodes_per_lease=2, lease_timeout_s=0.3)
    shelf = TabShelf(await BrowserPool.start(stage_site(["login-user"]), config), config)
    try:
        first, second = await shelf.take(), await shelf.take()
        with pytest.raises(SandboxError, match="no browser tab came free"):
            await shelf.take()
        await shelf.give_back(first)
        assert await shelf.take() is first
        await shelf.give_back(first)  # worn out: two episodes
        second.spoil()
        await shelf.give_back(second)  # broken
        assert shelf.num_used == shelf.pool.num_leased == await shelf.pool.num_contexts() == 0
        assert await shelf.take() not in (first, second)
        assert shelf.num_used == 1
    finally:
        await shelf.aclose()


async def test_shelf_ends_the_lease_of_a_tab_that_comes_back_after_it_closed(chromium: None) -> None:
    config = BrowserConfig(max_tabs=1, num_ready=0)
    shelf = TabShelf(await BrowserPool.start(stage_site(["login-user"]), config), config)
    tab = await shelf.take()
    await shelf.aclose()
    await shelf.give_back(tab)
    assert shelf.num_used == shelf.pool.num_leased == 0
    with pytest.raises(SandboxError, match="closed"):
        await shelf.take()


async def test_shelf_gives_each_episode_a_lifetime_of_its_own(chromium: None) -> None:
    config = BrowserConfig(max_tabs=1, num_ready=0, lifetime_s=3.0, load_timeout_s=2.0, call_timeout_s=2.0)
    shelf = TabShelf(await BrowserPool.start(stage_site(["login-user"]), config), config)
    try:
        first = await shelf.take()
        for _ in range(2):
            await asyncio.sleep(2.0)
            await shelf.give_back(first)
            assert await shelf.take() is first
        await asyncio.sleep(3.5)
        await shelf.give_back(first)  # over
        assert await shelf.take() is not first
    finally:
        await shelf.aclose()
