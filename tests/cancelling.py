"""Calls cancelled at every turn of the event loop, as those of episodes that are cut."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable


async def cancel_many(call: Callable[[], Awaitable[object]], *, rounds: int = 60, width: int = 24) -> None:
    """Make `width` calls at once and cancel them after a few turns or milliseconds, again and again."""
    moments = random.Random(0)
    for number in range(rounds):
        tasks = [asyncio.ensure_future(call()) for _ in range(width)]
        if number % 2:
            await asyncio.wait(tasks, timeout=moments.uniform(0.0, 0.03))
        else:
            for _ in range(moments.randrange(40)):
                await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
