"""Playwright's driver, a process of its own that belongs to somebody from the first moment.

Invariant: a driver that was asked for is stopped when its stack unwinds, also when its start was cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib

from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Playwright, async_playwright

_STOP_TIMEOUT_S = 5.0


async def start_driver(stack: contextlib.AsyncExitStack, start_timeout_s: float) -> Playwright:
    """Start one, which ends with `stack`; the caller sets the deadline, `start_timeout_s` is for one it gave up."""
    starting = asyncio.ensure_future(async_playwright().start())
    stack.push_async_callback(_stop, starting, start_timeout_s)
    # Playwright forgets a driver whose start is cancelled: it runs on, and nobody can end it.
    return await asyncio.shield(starting)


async def _stop(starting: asyncio.Future[Playwright], start_timeout_s: float) -> None:
    await asyncio.wait([starting], timeout=start_timeout_s)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
    if starting.cancelled() or starting.exception() is not None:
        return
    with contextlib.suppress(PlaywrightError, TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await starting.result().stop()
