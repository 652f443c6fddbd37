"""Players and helpers for the MiniWoB tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from palaestra.envs.browser import MiniWoB
from palaestra.types import Message, Task, ToolCall


@dataclass(frozen=True)
class Played:
    """A finished episode as the test sees it."""

    conversation: tuple[Message, ...]
    success: float
    is_truncated: bool


def call(name: str, **arguments: object) -> Message:
    """An assistant message with one call."""
    return Message("assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))


def task_of(page: str, seed: int) -> Task:
    """A task made by hand, for a page and seed of the test's own."""
    return Task(
        id=f"test/{page}/{seed}", env_id=MiniWoB.env_id, split="train", seed=seed, data={"page": page, "seed": seed}
    )


async def play_expert(env: MiniWoB, task: Task) -> Played:
    """The expert's episode."""
    return await play_sloppy(env, task, random.Random(0), 0.0)


async def play_sloppy(env: MiniWoB, task: Task, rng: random.Random, slip_rate: float) -> Played:
    """The expert's episode with a slip now and then."""
    observation, _ = await env.areset(options={"task": task})
    conversation: list[Message] = list(observation)
    expert = env.expert()
    while True:
        decision = expert.decide(task, conversation)
        is_slip = decision.slips and rng.random() < slip_rate
        action = rng.choice(decision.slips) if is_slip else decision.best
        observation, _, terminated, truncated, info = await env.astep(action)
        conversation += [action, *observation]
        if terminated or truncated:
            return Played(tuple(conversation), info["facts"]["success"], truncated)


async def play_fixed(env: MiniWoB, task: Task, actions: Sequence[Message]) -> Played:
    """An episode of given actions, up to its end."""
    observation, _ = await env.areset(options={"task": task})
    conversation: list[Message] = list(observation)
    for action in actions:
        observation, _, terminated, truncated, info = await env.astep(action)
        conversation += [action, *observation]
        if terminated or truncated:
            return Played(tuple(conversation), info["facts"]["success"], truncated)
    return Played(tuple(conversation), 0.0, False)
