"""The base of every environment: a multi-turn `gymnasium.Env` over messages, async inside, sync outside.

An author writes `make_task_data`, `begin`, `verify`, tools, and where needed `end`. Invariants: an episode ends
exactly once, by the agent finishing (terminated) or by a limit (truncated, with its own outcome); rewards
come from verified facts after the end; a failure of ours leaves as an exception, never as a number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar, TypeVar

import gymnasium

from palaestra.config import Config, merge, nearest
from palaestra.envs import _loop
from palaestra.envs._experts import Expert
from palaestra.envs._spaces import ActionSpace, ObservationSpace
from palaestra.envs._tools import BoundTool, InvalidCallError, ToolError, collect_tools, offered_tools
from palaestra.errors import ConfigError, PalaestraError, RewardError, SandboxError, TaskError, is_called_off
from palaestra.resources import Resources
from palaestra.rewards import Efficiency, RewardStack, Success, ToolValidity, Unsafe
from palaestra.types import (
    Form,
    JsonObject,
    Message,
    Observation,
    Outcome,
    Split,
    Task,
    ToolCall,
    ToolSpec,
    Transcript,
    Turn,
)

_log = logging.getLogger("palaestra")

Step = tuple[Observation, float, bool, bool, dict[str, Any]]
ValueT = TypeVar("ValueT")

DEFAULT_REWARD = Success() * 1.0 + ToolValidity() * 0.1 + Efficiency() * 0.1 - Unsafe() * 1.0


class EnvLimits(Config):
    """What one episode may use. Each limit on the agent has its own outcome."""

    max_turns: int = 8
    """Assistant messages; then the episode is truncated. At least 2."""
    tool_s: float = 20.0
    """Wall clock of one tool call in seconds; the agent reads that it timed out."""
    episode_s: float = 120.0
    """Wall clock of the episode in seconds, thinking included; then its outcome is timeout."""
    setup_s: float = 60.0
    """Wall clock of `begin`, of `verify` with the reward, and of `end`, in seconds each; later is a failure of ours."""

    def over(self, given: EnvLimits | Mapping[str, Any] | None) -> EnvLimits:
        """`given`; a table, as from TOML, changes only the keys it names. Raises `ConfigError` for a wrong one."""
        if given is None or isinstance(given, EnvLimits):
            return given or self
        if not isinstance(given, Mapping):
            raise ConfigError(f"limits must be a table, not {given!r}")
        return EnvLimits.parse(merge(self.model_dump(), given), source="limits")


class Env(gymnasium.Env[Observation, Message], ABC):
    """One agent, one task at a time. Subclass, decorate methods with `@tool`, give tasks, say what success is.

    Called plainly (`reset`, `step`, `close`) it runs on a background loop; async callers use `areset`,
    `astep`, `aclose` on their own loop. One instance keeps to one of the two.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # declared by Gymnasium as it is
    num_tasks: Mapping[Split, int]
    """Tasks in each split; `make_task` accepts indices below it."""
    default_limits: ClassVar[EnvLimits] = EnvLimits()
    env_id: ClassVar[str]
    """The id under which the class is registered, such as `palaestra/CodeRepair-v0`."""
    _offered: ClassVar[Mapping[Form, Mapping[str, BoundTool]]] = {"compact": {}, "full": {}}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = collect_tools(cls)
        cls._offered = {"compact": offered_tools(declared, "compact"), "full": offered_tools(declared, "full")}

    def __init__(
        self,
        *,
        form: Form = "full",
        split: Split = "train",
        reward: RewardStack = DEFAULT_REWARD,
        limits: EnvLimits | Mapping[str, Any] | None = None,
        resources: Resources | None = None,
        render_mode: str | None = None,
    ) -> None:
        if form not in ("compact", "full"):
            raise TaskError(f"form must be 'compact' or 'full', not {form!r}")
        self.form: Form = form
        self.split: Split = split
        self.reward = reward
        self.limits = self.default_limits.over(limits)
        self.render_mode = render_mode
        self.tools: tuple[ToolSpec, ...] = tuple(bound.spec for bound in self._offered[form].values())
        self.action_space = ActionSpace(self.tools)
        self.observation_space = ObservationSpace()
        self._given_resources = resources
        self._resources = resources
        self._task: Task | None = None
        self._turns: list[Turn] = []
        self._is_over = True
        self._is_ending = False
        self._is_finished = False
        self._deadline = 0.0

    # What an author writes.

    @abstractmethod
    def make_task_data(self, split: Split, index: int) -> JsonObject:
        """The data of task `index` of a split: a pure function of its arguments; JSON values only.

        Splits must differ by construction: no task of one split may equal a task of another.
        """

    @abstractmethod
    async def begin(self, task: Task) -> Observation:
        """Set the episode up and give its first messages."""

    @abstractmethod
    async def verify(self) -> Mapping[str, float]:
        """Facts about the finished episode, `success` in [0, 1] among them; called once, at the end."""

    async def end(self) -> None:
        """Release what `begin` took. Called exactly once for each `begin`, whatever happened."""

    async def on_message(self, message: Message) -> Observation:
        """Answer a message without tool calls. By default it is the agent's last word."""
        self.finish()
        return ()

    def expert(self) -> Expert:
        """The scripted expert; raises `TaskError` where an environment ships none."""
        raise TaskError(f"{type(self).__name__} ships no expert")

    # What an author calls.

    @property
    def task(self) -> Task:
        """The task of the running episode."""
        if self._task is None:
            raise TaskError("no episode is running: call reset() first")
        return self._task

    @property
    def resources(self) -> Resources:
        """Where long-lived parts are shared between episodes."""
        if self._resources is None:
            self._resources = _loop.join_shared_resources()
        return self._resources

    def finish(self) -> None:
        """Say that the agent is done: the episode ends with this step."""
        self._is_finished = True

    # The public interface.

    def make_task(self, split: Split, index: int) -> Task:
        """Task `index` of a split; raises `TaskError` outside `num_tasks`."""
        num_tasks = self._count_tasks(split)
        if not 0 <= index < num_tasks:
            raise TaskError(f"{self.env_id}: {split} has tasks 0 to {num_tasks - 1}, not {index}")
        data = self.make_task_data(split, index)
        return Task(id=f"{self.env_id}/{split}/{index}", env_id=self.env_id, split=split, seed=index, data=data)

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode. `options` may name the `task`, or a `split` and an `index`; else one is drawn."""
        super().reset(seed=seed)
        await self._leave_episode()
        self._task = self._choose_task(options or {})
        self._turns = []
        self._is_finished = False
        self._is_over = False
        self._deadline = time.monotonic() + self.limits.episode_s
        limit_s = self.limits.setup_s
        late = SandboxError(f"begin of {self._task.id} took longer than {limit_s:g} s")
        observation = await _in_time(self.begin(self._task), limit_s, late)
        return observation, {"task_id": self._task.id}

    async def astep(self, action: Message | str) -> Step:
        """Take one assistant message; raises `TaskError` when the episode is over."""
        if self._is_over:
            raise TaskError("the episode is over: call reset()")
        message = Message("assistant", action) if isinstance(action, str) else action
        if not self.action_space.contains(message):
            raise TaskError(f"an action is a message of the assistant, not {message!r}")
        started_s = time.monotonic()
        scope = asyncio.timeout(max(0.0, self._deadline - started_s))
        try:
            async with scope:
                turn = await self._take_turn(message, started_s)
        except TimeoutError:
            if not scope.expired():
                raise  # not a limit of the episode: something below it broke
            return await self._stop((), Outcome.TIMEOUT)
        self._turns.append(turn)
        if self._is_finished:
            return await self._stop(turn.observation, Outcome.SCORED)
        if len(self._turns) >= self.limits.max_turns:
            return await self._stop(turn.observation, Outcome.TRUNCATED)
        return turn.observation, 0.0, False, False, {"invalid_calls": turn.num_invalid_calls}

    async def atruncate(self) -> Step:
        """End the episode from outside, as truncated: the policy has no room for another message."""
        if self._is_over:
            raise TaskError("the episode is over: call reset()")
        return await self._stop((), Outcome.TRUNCATED)

    async def aclose(self) -> None:
        """End a running episode and leave shared resources; idempotent."""
        await self._leave_episode()
        if self._given_resources is None and self._resources is not None:
            self._resources = None
            await _loop.leave_shared_resources()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """`areset`, waited for."""
        return _loop.run(self.areset(seed=seed, options=options))

    def step(self, action: Message) -> Step:
        """`astep`, waited for."""
        return _loop.run(self.astep(action))

    def close(self) -> None:
        """`aclose`, waited for."""
        if self._task is not None or self._resources is not None:
            _loop.run(self.aclose())

    @property
    def is_ending(self) -> bool:
        """Whether `end` is under way: who calls the episode off now waits, or leaves half of it behind."""
        return self._is_ending

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of the running or last episode."""
        return tuple(self._turns)

    # How an episode runs.

    def _choose_task(self, options: Mapping[str, Any]) -> Task:
        unknown = sorted(set(options) - {"task", "split", "index"})
        if unknown:
            raise TaskError(f"unknown reset option {unknown[0]!r}{nearest(unknown[0], ['task', 'split', 'index'])}")
        if "task" in options:
            return self._check_task(options["task"])
        split: Split = options.get("split", self.split)
        index = options.get("index")
        if index is None:
            index = int(self.np_random.integers(self._count_tasks(split)))
        return self.make_task(split, index)

    def _count_tasks(self, split: Split) -> int:
        if split not in self.num_tasks:
            raise TaskError(f"{self.env_id}: no split {split!r}{nearest(split, list(self.num_tasks))}")
        return self.num_tasks[split]

    def _check_task(self, task: object) -> Task:
        if not isinstance(task, Task):
            raise TaskError(f"{self.env_id}: option 'task' must be a Task, not {type(task).__name__}")
        if task.env_id != self.env_id:
            raise TaskError(f"task {task.id} belongs to {task.env_id}, not to {self.env_id}")
        return task

    async def _take_turn(self, message: Message, started_s: float) -> Turn:
        answers: list[Message] = []
        num_invalid = 0
        for call in message.tool_calls:
            if self._is_finished:
                break
            answer, is_valid = await self._answer(call)
            answers.append(answer)
            num_invalid += not is_valid
        if not message.tool_calls:
            answers.extend(await self.on_message(message))
        return Turn(
            action=message,
            observation=tuple(answers),
            num_calls=len(message.tool_calls),
            num_invalid_calls=num_invalid,
            env_s=time.monotonic() - started_s,
        )

    async def _answer(self, call: ToolCall) -> tuple[Message, bool]:
        is_valid = True
        try:
            bound = self._find_tool(call)
            arguments = bound.check(call)
            async with asyncio.timeout(self.limits.tool_s) as scope:
                text = await getattr(self, bound.method_name)(**arguments)
        except InvalidCallError as error:
            is_valid, text = False, f"invalid call: {error}"
        except ToolError as error:
            text = f"error: {error}"
        except TimeoutError:
            if not scope.expired():
                raise  # the episode's own deadline, or a fault below the tool
            text = f"error: {call.name} took longer than {self.limits.tool_s:g} s"
        return Message("tool", text, name=call.name, tool_call_id=call.id), is_valid

    def _find_tool(self, call: ToolCall) -> BoundTool:
        if call.malformed:
            raise InvalidCallError("the call could not be parsed")
        offered = self._offered[self.form]
        if call.name not in offered:
            raise InvalidCallError(f"no tool {call.name!r}{nearest(call.name, list(offered))}")
        return offered[call.name]

    async def _stop(self, observation: Observation, outcome: Outcome) -> Step:
        try:
            info: dict[str, Any] = {"outcome": outcome.value, "task_id": self.task.id}
            if outcome is Outcome.TIMEOUT:
                return observation, 0.0, False, True, info
            reward, verdict = await self._judge(outcome)
            is_scored, is_truncated = outcome is Outcome.SCORED, outcome is Outcome.TRUNCATED
            return observation, reward, is_scored, is_truncated, info | verdict
        finally:
            await self._leave_episode()

    async def _judge(self, outcome: Outcome) -> tuple[float, dict[str, Any]]:
        """The reward, and what it was made of."""
        limit_s, started_s = self.limits.setup_s, time.monotonic()
        late = SandboxError(f"verify of {self.task.id} took longer than {limit_s:g} s")
        facts = dict(await _in_time(self.verify(), limit_s, late))
        if outcome is Outcome.TRUNCATED:
            facts["success"] = 0.0  # it ran out of turns before it said that it was done
        max_turns = self.limits.max_turns
        transcript = Transcript(task=self.task, turns=self.turns, facts=facts, outcome=outcome, max_turns=max_turns)
        left_s = max(0.0, limit_s - (time.monotonic() - started_s))
        unscored = RewardError(f"verify and reward of {self.task.id} took longer than {limit_s:g} s")
        score = await _in_time(self.reward.score(transcript), left_s, unscored)
        num_invalid = sum(turn.num_invalid_calls for turn in self._turns)
        return score.total, {"facts": facts, "terms": score.terms, "invalid_calls": num_invalid}

    async def _leave_episode(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._is_ending = True
        try:
            await self._end_in_time()
        finally:
            self._is_ending = False

    async def _end_in_time(self) -> None:
        limit_s = self.limits.setup_s
        try:
            await _in_time(self.end(), limit_s, SandboxError(f"end took longer than {limit_s:g} s"))
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_called_off():
                raise
            # an author's code, and what happened before it stands: the outcome, the reward, or an error that is
            # on its way out now. What is left behind is a matter for the log and the next sweep
            said = str(error) or type(error).__name__
            _log.warning("%s could not clean up after %s: %s", self.env_id, self.task.id, said)


async def _in_time(awaitable: Awaitable[ValueT], limit_s: float, late: PalaestraError) -> ValueT:
    """What `awaitable` gives; raises `late` after `limit_s` seconds."""
    scope = asyncio.timeout(limit_s)
    try:
        async with scope:
            return await awaitable
    except TimeoutError as error:
        if not scope.expired():
            raise  # something below ran into a limit of its own
        raise late from error
