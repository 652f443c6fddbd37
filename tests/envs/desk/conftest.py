"""Shared by the service desk's tests: one real server for each test module, and a player."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import pytest_asyncio

from palaestra.envs.desk import ToolDesk
from palaestra.resources import Resources
from palaestra.types import Message, ToolCall


@dataclass(frozen=True)
class Played:
    """What one episode left behind."""

    conversation: tuple[Message, ...]
    reward: float
    info: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, float]:
        facts: Mapping[str, float] = self.info["facts"]
        return facts


class Player(Protocol):
    async def __call__(self, env: ToolDesk, index: int, *, slip_rate: float = 0.0, seed: int = 0) -> Played: ...


@pytest.fixture
def play() -> Player:
    """Plays the expert, which takes a uniform slip with probability `slip_rate` at each decision."""

    async def run(env: ToolDesk, index: int, *, slip_rate: float = 0.0, seed: int = 0) -> Played:
        rng = random.Random(f"{seed} {index}")
        observation, _ = await env.areset(options={"index": index})
        conversation = list(observation)
        while True:
            decision = env.expert().decide(env.task, conversation)
            is_slip = bool(decision.slips) and rng.random() < slip_rate
            action = rng.choice(decision.slips) if is_slip else decision.best
            observation, reward, terminated, truncated, info = await env.astep(action)
            conversation += [action, *observation]
            if terminated or truncated:
                return Played(tuple(conversation), reward, info)

    return run


@pytest.fixture
def call() -> Callable[..., Message]:
    """Makes an assistant message with one tool call."""

    def make(tool: str, /, **arguments: object) -> Message:
        return Message("assistant", tool_calls=(ToolCall(name=tool, arguments=arguments),))

    return make


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def resources() -> AsyncIterator[Resources]:
    """One server for the module."""
    async with Resources() as shared:
        yield shared
