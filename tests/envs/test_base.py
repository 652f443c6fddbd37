"""The contract of `Env`: an episode begins and ends once, limits have outcomes, faults of ours are no numbers."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from palaestra.envs import Env, EnvLimits, ToolError, tool
from palaestra.errors import RewardError, SandboxError, TaskError
from palaestra.resources import Resources
from palaestra.rewards import Success
from palaestra.types import JsonObject, Message, Observation, Split, Task, ToolCall


class Letters(Env):
    """Write the asked letter; `fault` breaks one hook, `log` keeps the hooks called."""

    env_id = "test/Letters-v0"
    num_tasks: Mapping[Split, int] = {"train": 20, "validation": 3, "test": 3}
    default_limits = EnvLimits(max_turns=4)

    def __init__(self, *, fault: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault = fault
        self.log: list[str] = []
        self.written = ""

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        return {"letter": chr(ord("a") + index), "split": split}

    def _reach(self, hook: str) -> None:
        self.log.append(hook)
        if self.fault == hook:
            raise SandboxError(f"{hook} broke")

    async def begin(self, task: Task) -> Observation:
        self.written = ""
        self._reach("begin")
        return (Message("user", f"write {task.data['letter']}"),)

    async def verify(self) -> Mapping[str, float]:
        self._reach("verify")
        return {} if self.fault == "facts" else {"success": float(self.written == self.task.data["letter"])}

    async def end(self) -> None:
        self._reach("end")

    @tool
    async def write(self, letter: str) -> str:
        """Write one letter."""
        self._reach("write")
        if self.fault == "timeout":
            raise TimeoutError("a socket below the tool timed out")
        if letter == "?":
            raise ToolError("no such letter")
        if letter == "slow":
            await asyncio.sleep(60)
        self.written += letter
        return "ok"

    @tool
    async def done(self) -> str:
        """End."""
        self.finish()
        return "bye"


def say(*calls: tuple[str, dict[str, Any]]) -> Message:
    return Message(
        "assistant", tool_calls=tuple(ToolCall(name=n, arguments=a, id=f"c{i}") for i, (n, a) in enumerate(calls))
    )


DONE = say(("done", {}))
WRITE_A = say(("write", {"letter": "a"}))
FIRST = {"index": 0}


def test_gymnasium_accepts_it_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = Letters()
        check_env(env, skip_render_check=True)
        env.close()


async def test_an_episode_from_first_message_to_score() -> None:
    env = Letters(reward=Success() * 2.0)
    observation, info = await env.areset(options=FIRST)
    assert (observation, info) == ((Message("user", "write a"),), {"task_id": "test/Letters-v0/train/0"})
    observation, reward, terminated, truncated, info = await env.astep(WRITE_A)
    assert observation == (Message("tool", "ok", name="write", tool_call_id="c0"),)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"invalid_calls": 0})
    observation, reward, terminated, truncated, info = await env.astep(DONE)
    assert (observation[0].content, reward, terminated, truncated) == ("bye", 2.0, True, False)
    assert (info["outcome"], info["facts"], info["invalid_calls"]) == ("scored", {"success": 1.0}, 0)
    assert [turn.num_calls for turn in env.turns] == [1, 1]
    assert env.log == ["begin", "write", "verify", "end"]


async def test_a_message_without_calls_is_the_last_word() -> None:
    env = Letters()
    await env.areset(options=FIRST)
    observation, _, terminated, _, info = await env.astep("I give up")
    assert (observation, terminated, info["facts"]["success"]) == ((), True, 0.0)


async def test_several_calls_are_answered_in_order_and_stop_at_the_end() -> None:
    env = Letters()
    await env.areset(options={"index": 1})
    action = say(("write", {"letter": "b"}), ("done", {}), ("write", {"letter": "c"}))
    observation, _, terminated, _, info = await env.astep(action)
    assert [(m.content, m.tool_call_id) for m in observation] == [("ok", "c0"), ("bye", "c1")]
    assert terminated
    assert info["facts"]["success"] == 1.0


async def test_what_a_tool_refuses_and_what_is_invalid_are_told_apart() -> None:
    env = Letters()
    await env.areset(options=FIRST)
    malformed = ToolCall(name="", malformed="<call>write(")
    calls = say(("write", {"letter": "?"}), ("write", {}), ("writ", {})).tool_calls
    observation, _, _, _, info = await env.astep(Message("assistant", tool_calls=(*calls, malformed)))
    assert [m.content for m in observation] == [
        "error: no such letter",
        "invalid call: letter: Field required",
        "invalid call: no tool 'writ'; did you mean 'write'?",
        "invalid call: the call could not be parsed",
    ]
    assert info == {"invalid_calls": 3}


async def test_out_of_turns_is_truncated_and_no_success() -> None:
    env = Letters()
    await env.areset(options=FIRST)
    for action in [WRITE_A] + [say(("write", {}))] * 3:
        _, _, terminated, truncated, info = await env.astep(action)
    assert (terminated, truncated, info["outcome"]) == (False, True, "truncated")
    assert info["facts"] == {"success": 0.0}
    assert info["invalid_calls"] == 3


async def test_finishing_with_the_last_turn_is_scored() -> None:
    env = Letters(limits=EnvLimits(max_turns=2))
    await env.areset(options=FIRST)
    await env.astep(WRITE_A)
    *_, terminated, truncated, info = await env.astep(DONE)
    assert (terminated, truncated, info["outcome"]) == (True, False, "scored")


async def test_a_slow_tool_is_told_so_and_the_episode_goes_on() -> None:
    env = Letters(limits=EnvLimits(tool_s=0.05))
    await env.areset(options=FIRST)
    observation, _, terminated, truncated, _ = await env.astep(say(("write", {"letter": "slow"})))
    assert observation[0].content == "error: write took longer than 0.05 s"
    assert (terminated, truncated) == (False, False)
    await env.aclose()


async def test_an_episode_past_its_deadline_is_a_timeout_without_facts() -> None:
    env = Letters(limits=EnvLimits(episode_s=0.05))
    await env.areset(options=FIRST)
    _, reward, terminated, truncated, info = await env.astep(say(("write", {"letter": "slow"})))
    assert (reward, terminated, truncated, info["outcome"]) == (0.0, False, True, "timeout")
    assert "facts" not in info
    assert env.log == ["begin", "write", "end"]


async def test_a_timeout_error_below_a_tool_is_not_mistaken_for_a_limit() -> None:
    env = Letters(fault="timeout")
    await env.areset(options=FIRST)
    with pytest.raises(TimeoutError, match="a socket below the tool timed out"):
        await env.astep(WRITE_A)
    await env.aclose()


async def test_a_fault_of_ours_in_a_tool_leaves_as_it_is_and_the_episode_is_cleaned_up() -> None:
    env = Letters(fault="write")
    await env.areset(options=FIRST)
    with pytest.raises(SandboxError, match="write broke"):
        await env.astep(WRITE_A)
    await env.aclose()
    await env.aclose()
    assert env.log == ["begin", "write", "end"]


async def test_begin_that_fails_is_followed_by_one_end() -> None:
    env = Letters(fault="begin")
    with pytest.raises(SandboxError, match="begin broke"):
        await env.areset()
    env.fault = ""
    await env.areset()
    await env.aclose()
    assert env.log == ["begin", "end", "begin", "end"]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [("verify", SandboxError, "verify broke"), ("facts", RewardError, "success raised KeyError")],
)
async def test_a_verdict_that_fails_is_an_error_and_never_a_number(
    fault: str, error: type[Exception], words: str
) -> None:
    env = Letters(fault=fault)
    await env.areset(options=FIRST)
    with pytest.raises(error, match=words):
        await env.astep(DONE)
    assert env.log == ["begin", "verify", "end"]
    with pytest.raises(TaskError, match="the episode is over"):
        await env.astep(DONE)


async def test_an_end_that_fails_does_not_take_the_reward_away(caplog: pytest.LogCaptureFixture) -> None:
    env = Letters(fault="end")
    await env.areset(options=FIRST)
    *_, terminated, _, info = await env.astep(DONE)
    assert (terminated, info["outcome"]) == (True, "scored")
    assert "could not clean up after test/Letters-v0/train/0: end broke" in caplog.text


async def test_cutting_an_episode_short_from_outside() -> None:
    env = Letters()
    await env.areset(options=FIRST)
    *_, terminated, truncated, info = await env.atruncate()
    assert (terminated, truncated, info["outcome"]) == (False, True, "truncated")
    with pytest.raises(TaskError, match="the episode is over"):
        await env.atruncate()


async def test_reset_in_the_middle_ends_the_old_episode_first() -> None:
    env = Letters()
    await env.areset()
    await env.areset()
    await env.aclose()
    assert env.log == ["begin", "end", "begin", "end"]


async def test_seeds_draw_tasks_and_options_name_them() -> None:
    env = Letters()
    drawn = [(await env.areset(seed=seed))[1]["task_id"] for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    _, info = await env.areset(options={"split": "test", "index": 2})
    assert info["task_id"] == "test/Letters-v0/test/2"
    task = env.make_task("validation", 1)
    await env.areset(options={"task": task})
    assert env.task is task
    await env.aclose()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indx": 1}, "unknown reset option 'indx'; did you mean 'index'?"),
        ({"index": 20}, "train has tasks 0 to 19, not 20"),
        ({"index": -1}, "train has tasks 0 to 19, not -1"),
        ({"split": "tests"}, "no split 'tests'; did you mean 'test'?"),
        ({"task": 3}, "option 'task' must be a Task, not int"),
        ({"task": Task(id="x", env_id="other/E-v0", split="train", seed=0)}, "belongs to other/E-v0"),
    ],
)
async def test_reset_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    env = Letters()
    with pytest.raises(TaskError) as caught:
        await env.areset(options=options)
    assert words in str(caught.value)
    assert env.log == []


async def test_stepping_needs_an_episode_and_a_message_of_the_assistant() -> None:
    env = Letters()
    with pytest.raises(TaskError, match=r"call reset\(\)"):
        await env.astep(DONE)
    with pytest.raises(TaskError, match=r"call reset\(\) first"):
        _ = env.task
    await env.areset()
    with pytest.raises(TaskError, match="a message of the assistant"):
        await env.astep(Message("user", "hi"))
    await env.aclose()


def test_a_form_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TaskError, match="form must be 'compact' or 'full', not 'tiny'"):
        Letters(form="tiny")


def test_an_environment_without_an_expert_says_so() -> None:
    with pytest.raises(TaskError, match="Letters ships no expert"):
        Letters().expert()


async def test_parallel_instances_do_not_mix() -> None:
    async def play(index: int) -> float:
        env = Letters()
        await env.areset(options={"index": index})
        await env.astep(say(("write", {"letter": chr(ord("a") + index)})))
        *_, info = await env.astep(DONE)
        return float(info["facts"]["success"])

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(play(index)) for index in range(16)]
    assert [task.result() for task in tasks] == [1.0] * 16


class Shared:
    """A part that remembers whether it is closed."""

    is_closed = False

    async def aclose(self) -> None:
        self.is_closed = True


async def start_shared() -> Shared:
    return Shared()


async def test_environments_without_given_resources_share_the_loops_own_until_the_last_leaves() -> None:
    one, other = Letters(), Letters()
    part = await one.resources.get("part", start_shared)
    assert await other.resources.get("part", start_shared) is part
    await one.aclose()
    await one.aclose()
    assert not part.is_closed
    await other.aclose()
    assert part.is_closed


async def test_given_resources_are_left_to_their_owner() -> None:
    async with Resources() as resources:
        env = Letters(resources=resources)
        part = await env.resources.get("part", start_shared)
        await env.aclose()
        assert not part.is_closed
    assert part.is_closed
