"""Shared by the tests of CodeRepair: every property on every sandbox back end that this machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from palaestra.envs.code import CodeRepair
from palaestra.envs.code._workspace import Workspace
from palaestra.resources import Resources
from palaestra.sandboxes import check_backend
from palaestra.types import Message, Task, ToolCall
from tests.conftest import require

_PARTS = {"jail": "bwrap", "docker": "docker"}
_reasons: dict[str, str | None] = {}

Pick = Callable[[CodeRepair, Sequence[Message]], Message]


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


def call(tool: str, /, **arguments: object) -> Message:
    """An assistant message with one tool call."""
    return Message("assistant", tool_calls=(ToolCall(name=tool, arguments=arguments),))


def play_expert(env: CodeRepair, conversation: Sequence[Message]) -> Message:
    """The expert's best."""
    return env.expert().decide(env.task, conversation).best


def say(*messages: Message) -> Pick:
    """These messages in order, whatever is answered."""
    waiting = list(messages)
    return lambda env, conversation: waiting.pop(0)


async def play(env: CodeRepair, pick: Pick, *, index: int = 0, task: Task | None = None) -> Played:
    """One episode of task `index` of the environment's split, or of `task`."""
    observation, _ = await env.areset(options={"task": task or env.make_task(env.split, index)})
    conversation = list(observation)
    while True:
        action = pick(env, conversation)
        observation, reward, terminated, truncated, info = await env.astep(action)
        conversation += [action, *observation]
        if terminated or truncated:
            return Played(tuple(conversation), reward, info)


@pytest.fixture(params=sorted(_PARTS))
def sandbox(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in _reasons:
        _reasons[name] = check_backend(name)
    require(_PARTS[name], _reasons[name])
    return name


@pytest.fixture
async def resources() -> AsyncIterator[Resources]:
    async with Resources() as shared:
        yield shared


@pytest.fixture
async def workspace(sandbox: str, resources: Resources) -> AsyncIterator[Workspace]:
    workspace = Workspace(resources, sandbox, 1, {})
    yield workspace
    await workspace.aclose()
