"""Demonstrations: scripted experts play a suite's tasks, and their conversations become token sequences.

Invariant: a demonstration is a pure function of (suite, task, skill, seed), however many are played at once.
A sloppy expert (skill below 1) leaves reinforcement learning something to learn; skill 1 is the clean expert.
"""

from __future__ import annotations

import zlib
from asyncio import TaskGroup
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from palaestra.agents import ExpertPolicy, Renderer, run_episode
from palaestra.envs import EnvSuite
from palaestra.errors import TaskError, ungrouped
from palaestra.resources import Resources
from palaestra.types import Episode, Message, Split, Task, ToolSpec, Trajectory

_MAX_FAILED_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One finished conversation and the tools that it was held with."""

    task_id: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    is_success: bool


async def collect(
    suite: EnvSuite,
    count: int,
    *,
    skill: float,
    seed: int,
    concurrency: int = 16,
    split: Split = "train",
    start: int = 0,
    resources: Resources | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Demonstration]:
    """Play `count` tasks of a split, each environment's tasks from index `start` on, in order of the tasks.

    Environments share `resources`, or parts of their own that are closed at the end. `on_episode` hears of
    each episode as it ends. An episode that a failure of ours ended is left out; raises `TaskError` when more
    than a tenth are.
    """
    chosen = suite.split(split)
    tasks = chosen.tasks(count, start=start)
    episodes: list[Episode | None] = [None] * count
    queue = iter(enumerate(tasks))
    own = Resources()
    player = _Player(chosen, skill, seed, resources or own, on_episode)
    with ungrouped():
        async with own, TaskGroup() as group:
            for _ in range(min(concurrency, count)):
                group.create_task(player.play(queue, episodes))
    return _keep([episode for episode in episodes if episode is not None], player.tools)


class _Player:
    """Plays tasks from a queue; several `play` at once take turns."""

    def __init__(
        self,
        suite: EnvSuite,
        skill: float,
        seed: int,
        resources: Resources,
        on_episode: Callable[[Episode], None] | None,
    ) -> None:
        self.tools: dict[str, tuple[ToolSpec, ...]] = {}
        self._suite = suite
        self._policy = ExpertPolicy(skill=skill)
        self._seed = seed
        self._resources = resources
        self._on_episode = on_episode

    async def play(self, queue: Iterator[tuple[int, Task]], episodes: list[Episode | None]) -> None:
        for position, task in queue:
            env = self._suite.make(task.env_id, resources=self._resources)
            self.tools[task.env_id] = env.tools
            seed = zlib.crc32(f"{self._seed} {task.id}".encode())
            episode = await run_episode(env, self._policy, task, episode_id=task.id, seed=seed)
            episodes[position] = episode
            if self._on_episode is not None:
                self._on_episode(episode)


def _keep(episodes: Sequence[Episode], tools: dict[str, tuple[ToolSpec, ...]]) -> list[Demonstration]:
    failed = [episode for episode in episodes if episode.reward is None]
    if len(failed) > _MAX_FAILED_SHARE * len(episodes):
        first = failed[0]
        reason = first.failure.message if first.failure else first.outcome
        raise TaskError(f"{len(failed)} of {len(episodes)} demonstrations failed, first {first.task.id}: {reason}")
    return [
        Demonstration(task_id=e.task.id, messages=e.messages, tools=tools[e.env_id], is_success=e.is_success)
        for e in episodes
        if e.reward is not None
    ]


def texts_of(demonstrations: Sequence[Demonstration]) -> Iterator[str]:
    """Every text in the conversations, calls included: what a tokenizer is made from."""
    for demonstration in demonstrations:
        for message in demonstration.messages:
            yield message.content
            for call in message.tool_calls:
                yield call.name
                yield from (str(value) for value in call.arguments.values())


def tokenize(demonstrations: Sequence[Demonstration], renderer: Renderer) -> list[Trajectory]:
    """The conversations as the policy would have lived them, with the expert's replies in the loss mask.

    Log-probabilities are 0 and versions 0: nobody sampled these tokens. What was said after the last reply is
    left out. A conversation without a reply raises `ValueError`.
    """
    return [_tokenize_one(demonstration, renderer) for demonstration in demonstrations]


def _tokenize_one(demonstration: Demonstration, renderer: Renderer) -> Trajectory:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for is_reply, block in groupby(demonstration.messages, key=lambda message: message.role == "assistant"):
        messages = tuple(block)
        if is_reply:
            for number, message in enumerate(messages):
                if number:
                    ids = renderer.extend(ids, ())  # two replies in a row: an environment that answered nothing
                begin = len(ids)
                ids.extend(renderer.encode_reply(message, demonstration.tools))
                spans.append((begin, len(ids)))
        else:
            ids = renderer.extend(ids, messages) if spans else renderer.start(messages, demonstration.tools)
    if not spans:
        raise ValueError(f"the demonstration of {demonstration.task_id} has no reply")
    return _to_trajectory(ids[: spans[-1][1]], spans)


def _to_trajectory(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Trajectory:
    loss_mask = np.zeros(len(ids), np.bool_)
    turns = np.full(len(ids), -1, np.int16)
    for turn, (begin, end) in enumerate(spans):
        loss_mask[begin:end] = True
        turns[begin:] = turn
    return Trajectory(
        ids=np.asarray(ids, np.int32),
        loss_mask=loss_mask,
        logprobs=np.zeros(len(ids), np.float32),
        versions=np.where(loss_mask, 0, -1).astype(np.int32),
        turns=turns,
    )
