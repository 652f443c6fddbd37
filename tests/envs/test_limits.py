"""Limits: tables from TOML, and deadlines of what the environment itself does around an episode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import pytest

from palaestra.envs import Env, EnvLimits, EnvSuite, _registry, register
from palaestra.errors import ConfigError, RewardError, SandboxError
from palaestra.rewards import Reward, Success
from palaestra.types import JsonObject, Message, Observation, Split, Task, Transcript

SHORT = EnvLimits(setup_s=0.05)


class Stuck(Env):
    """Nothing to do; the hook named by `hangs` never returns, the one named by `late` has a socket that times out."""

    env_id = "test/Stuck-v0"
    num_tasks: Mapping[Split, int] = {"train": 5, "validation": 5, "test": 5}
    default_limits = EnvLimits(tool_s=7.0)

    def __init__(self, *, hangs: str = "", late: str = "", size: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise ValueError(f"size must be above 0, not {size}")
        self.hangs, self.late = hangs, late
        self.log: list[str] = []

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        return {"number": index}

    async def begin(self, task: Task) -> Observation:
        await self._reach("begin")
        return (Message("user", "hi"),)

    async def verify(self) -> Mapping[str, float]:
        await self._reach("verify")
        return {"success": 1.0}

    async def end(self) -> None:
        await self._reach("end")

    async def _reach(self, hook: str) -> None:
        self.log.append(hook)
        if self.late == hook:
            raise TimeoutError("a socket timed out")
        if self.hangs == hook:
            await asyncio.Event().wait()


class Hanging(Reward):
    """A term that never answers."""

    name = "hanging"

    async def value(self, transcript: Transcript) -> float | None:
        await asyncio.Event().wait()
        return None


async def test_a_begin_that_hangs_is_a_failure_of_ours() -> None:
    env = Stuck(hangs="begin", limits=SHORT)
    with pytest.raises(SandboxError, match=r"begin of test/Stuck-v0/train/0 took longer than 0\.05 s"):
        await env.areset(options={"index": 0})
    await env.aclose()
    assert env.log == ["begin", "end"]


async def test_a_verify_that_hangs_is_a_failure_of_ours() -> None:
    env = Stuck(hangs="verify", limits=SHORT)
    await env.areset(options={"index": 0})
    with pytest.raises(SandboxError, match=r"verify of test/Stuck-v0/train/0 took longer than 0\.05 s"):
        await env.astep("done")
    assert env.log == ["begin", "verify", "end"]


async def test_a_reward_that_hangs_is_unscorable() -> None:
    env = Stuck(reward=Success() + Hanging(), limits=SHORT)
    await env.areset(options={"index": 0})
    with pytest.raises(RewardError, match=r"reward of test/Stuck-v0/train/0 took longer than 0\.05 s"):
        await env.astep("done")
    assert env.log == ["begin", "verify", "end"]


async def test_an_end_that_hangs_is_given_up_and_the_reward_stands(caplog: pytest.LogCaptureFixture) -> None:
    env = Stuck(hangs="end", limits=SHORT)
    await env.areset(options={"index": 0})
    *_, terminated, _, info = await env.astep("done")
    assert (terminated, info["outcome"]) == (True, "scored")
    assert "could not clean up after test/Stuck-v0/train/0: end took longer than 0.05 s" in caplog.text


@pytest.mark.parametrize("hook", ["begin", "verify"])
async def test_a_timeout_error_below_a_hook_is_not_mistaken_for_its_deadline(hook: str) -> None:
    env = Stuck(late=hook)
    with pytest.raises(TimeoutError, match="a socket timed out"):  # noqa: PT012  # either call may be the one
        await env.areset()
        await env.astep("done")
    await env.aclose()


async def test_a_cancellation_passes_through_an_end() -> None:
    env = Stuck(hangs="end")
    await env.areset()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):  # its cancellation must come out, else it would not expire
            await env.aclose()


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_registry, "_registrations", dict(_registry._registrations))
    register("test/Stuck-v0", "tests.envs.test_limits:Stuck", family="toy", summary="stuck")
    monkeypatch.setattr("palaestra.envs._suite.load_class", lambda env_id: Stuck)
    yield
    gymnasium.registry.pop("test/Stuck-v0", None)


def make(**options: Any) -> Env:
    """The environment with these options, as a suite makes it."""
    return EnvSuite({"test/Stuck-v0": 1.0}, options={"test/Stuck-v0": options}).make("test/Stuck-v0")


@pytest.mark.usefixtures("_registered")
def test_limits_may_be_a_table_over_those_of_the_class() -> None:
    assert make(limits={"max_turns": 3}).limits == EnvLimits(max_turns=3, tool_s=7.0)
    assert make().limits is Stuck.default_limits
    assert make(limits=SHORT).limits is SHORT


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "options of test/Stuck-v0: size must be above 0, not 0"),
        ({"sise": 0}, "options of test/Stuck-v0: "),
        ({"limits": {"max_turn": 3}}, "limits: unknown key 'max_turn'; did you mean 'max_turns'?"),
        ({"limits": {"max_turns": "many"}}, "limits: max_turns: Input should be a valid integer"),
        ({"limits": 3}, "limits must be a table, not 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert words in str(caught.value)
