"""`SlowDesk`: the service desk of `ToolDesk`, whose tools take time, and some of them much more than others.

Invariant: how long an episode's calls take is a function of its task and seed, so every setting meets the same delays.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

from palaestra.envs import register
from palaestra.envs.desk import ToolDesk
from palaestra.types import Message, Task, ToolCall

ENV_ID = "bench/SlowDesk-v0"
SLOW_OF_LONG = 3
"""One in so many of the tasks that ask for two changes is slow."""


class SlowDesk(ToolDesk):
    """`ToolDesk` with `latency_s` added to every tool call, over its real HTTP service.

    In slow tasks, which all are long ones, a call takes `slow_factor` times as long with probability one half.
    """

    env_id = ENV_ID

    def __init__(self, *, latency_s: float = 0.0, slow_factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._latency_s = latency_s
        self._slow_factor = slow_factor

    async def _answer(self, call: ToolCall) -> tuple[Message, bool]:
        is_slow = is_slow_task(self.task) and self.np_random.random() < 0.5
        await asyncio.sleep(self._latency_s * (self._slow_factor if is_slow else 1.0))
        return await super()._answer(call)


def is_long_task(task: Task) -> bool:
    """Whether a task asks for two changes."""
    return len(task.data["request"]["steps"]) > 1


def is_slow_task(task: Task) -> bool:
    """Whether the tools are slow in a task: about one task in ten."""
    return is_long_task(task) and zlib.crc32(f"{task.split} {task.seed}".encode()) % SLOW_OF_LONG == 0


def register_desk() -> None:
    """Make `bench/SlowDesk-v0` known."""
    register(ENV_ID, f"{__name__}:SlowDesk", family="tools", summary="the service desk with slow tools")
