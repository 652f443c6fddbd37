"""Contract of the rollout runner: whatever happens, an episode with a typed outcome, and numbers only where due."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import anyio
import pytest

from palaestra.agents import Cutoff, ExpertPolicy, Policy, RandomPolicy, run_episode
from palaestra.envs import DEFAULT_REWARD, Env
from palaestra.errors import ConfigError, ContextFullError, PolicyError, WorkerError
from palaestra.rewards import Reward, RewardStack, Success
from palaestra.types import Episode, Message, Observation, Outcome, Task, Transcript
from tests.toys import Echo, call


class Script:
    """A policy that says given messages, or raises a given error when they run out."""

    name = "script"

    def __init__(self, *messages: Message, error: Exception | None = None) -> None:
        self._messages = messages
        self._error = error

    def session(self, env: Env, task: Task, *, seed: int) -> Script:
        self._rest = list(self._messages)
        return self

    async def act(self, observation: Observation) -> Message:
        if not self._rest:
            raise self._error or AssertionError("the script is over")
        return self._rest.pop(0)

    def trajectory(self) -> None:
        return None

    async def __aenter__(self) -> Script:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


async def play(policy: Policy, *, fault: str = "", reward: RewardStack = DEFAULT_REWARD) -> Episode:
    env = Echo(fault=fault, reward=reward)
    task = env.make_task("test", 3)
    return await run_episode(env, policy, task, episode_id="e", seed=0)


async def test_expert_scores_and_every_message_is_kept() -> None:
    episode = await play(ExpertPolicy())
    assert episode.outcome is Outcome.SCORED
    assert episode.is_success
    assert [message.role for message in episode.messages] == ["user", "assistant", "tool", "assistant", "tool"]
    assert [turn.num_calls for turn in episode.turns] == [1, 1]
    # success 1 + validity 0.1 * 1 + efficiency 0.1 * (1 - 2 / 4) - unsafe 0
    assert episode.reward == pytest.approx(1.15)
    assert sum(term.contribution for term in episode.terms) == pytest.approx(episode.reward)


async def test_wrong_word_is_a_scored_failure() -> None:
    episode = await play(Script(call("say", word="no"), call("stop")))
    assert (episode.outcome, episode.is_success) == (Outcome.SCORED, False)
    assert episode.reward == pytest.approx(0.1)


async def test_running_out_of_turns_is_truncated_and_never_a_success() -> None:
    episode = await play(Script(*[call("say", word="fox")] * 4))
    assert episode.outcome is Outcome.TRUNCATED
    assert not episode.is_success
    assert episode.facts["success"] == 0.0


async def test_full_context_truncates_with_a_score() -> None:
    episode = await play(Script(call("say", word="fox"), error=ContextFullError("full")))
    assert episode.outcome is Outcome.TRUNCATED
    assert episode.reward is not None


@pytest.mark.parametrize("fault", ["begin", "step", "verify"])
async def test_infrastructure_failure_never_carries_a_number(fault: str) -> None:
    episode = await play(ExpertPolicy(), fault=fault)
    assert episode.outcome is Outcome.INFRA_ERROR
    assert episode.reward is None
    assert episode.terms == ()
    assert episode.failure is not None
    assert (episode.failure.boundary, episode.failure.kind) == ("env", "SandboxError")


async def test_policy_failure_names_the_policy() -> None:
    episode = await play(Script(error=PolicyError("endpoint gone")))
    assert episode.outcome is Outcome.INFRA_ERROR
    assert episode.failure is not None
    assert (episode.failure.boundary, episode.failure.message) == ("policy", "endpoint gone")


@pytest.mark.parametrize("error", [WorkerError("engine was killed"), ConfigError("no browser here")])
async def test_what_no_episode_can_mend_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)):
        await play(Script(error=error))


@pytest.mark.parametrize("fault", ["", "begin", "step", "verify"])
async def test_every_begun_episode_is_ended(fault: str) -> None:
    before = Echo.num_open
    await play(ExpertPolicy(), fault=fault)
    assert Echo.num_open == before


class Silent(Reward):
    """A term with nothing to say."""

    name = "silent"

    async def value(self, transcript: Transcript) -> float | None:
        return None


async def test_silent_reward_term_makes_the_episode_unscorable() -> None:
    episode = await play(ExpertPolicy(), reward=Success() + Silent())
    assert episode.outcome is Outcome.UNSCORABLE
    assert episode.reward is None


async def test_slow_tool_is_an_observation() -> None:
    episode = await play(Script(call("say", word="fox"), call("stop")), fault="slow")
    assert episode.outcome is Outcome.SCORED
    assert "took longer than 0.2 s" in episode.messages[2].content


async def test_unknown_tool_is_counted_invalid_and_answered_with_the_nearest_name() -> None:
    episode = await play(Script(call("sey", word="fox"), call("stop")))
    assert episode.turns[0].num_invalid_calls == 1
    assert "did you mean 'say'" in episode.messages[2].content


async def test_failure_to_clean_up_does_not_change_the_reward() -> None:
    episode = await play(ExpertPolicy(), fault="end")
    assert episode.outcome is Outcome.SCORED
    assert episode.reward == pytest.approx(1.15)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ConfigError("no part"), WorkerError("dead")])
@pytest.mark.parametrize("policy", [ExpertPolicy(), Script(error=PolicyError("endpoint gone"))])
async def test_no_error_of_an_end_escapes_or_changes_the_outcome(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, policy: Policy
) -> None:
    expected = (await play(policy)).outcome

    async def fail(env: Echo) -> None:
        raise error

    monkeypatch.setattr(Echo, "end", fail)
    episode = await play(policy)
    assert episode.outcome is expected
    assert f"could not clean up after {episode.task.id}: {error}" in caplog.text


async def test_random_policy_is_a_function_of_its_seed() -> None:
    first, second = await play(RandomPolicy()), await play(RandomPolicy())
    assert first.messages == second.messages


class _SlowToEnd(Echo):
    def __init__(self) -> None:
        super().__init__()
        self.is_in_end, self.may_end = asyncio.Event(), asyncio.Event()

    async def end(self) -> None:
        self.is_in_end.set()
        await self.may_end.wait()
        await super().end()


@pytest.mark.parametrize("is_cut", [True, False])
async def test_an_episode_that_is_called_off_while_it_ends_is_ended_nevertheless(is_cut: bool) -> None:
    """What an environment gives back in `end` is given back once it began to, however often it is called off."""
    env, cutoff, num_open = _SlowToEnd(), Cutoff(), Echo.num_open
    task = env.make_task("test", 3)
    playing = asyncio.create_task(run_episode(env, ExpertPolicy(), task, episode_id="e", seed=0, cutoff=cutoff))
    await env.is_in_end.wait()
    for _ in range(3):
        if is_cut:
            cutoff.cut("late")
        else:
            playing.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    assert not playing.done()
    env.may_end.set()
    await asyncio.wait((playing,))
    assert Echo.num_open == num_open
    if is_cut:
        assert playing.result().outcome is Outcome.SCORED, "it had its reward before it was cut"
    else:
        assert playing.cancelled()


class _Hanging(Echo):
    """Hangs where it is told to, and says when it is there."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.is_there = where, asyncio.Event()

    async def begin(self, task: Task) -> Observation:
        observation = await super().begin(task)
        await self._hang("begin")
        return observation

    async def verify(self) -> Mapping[str, float]:
        await self._hang("verify")
        return await super().verify()

    async def _hang(self, where: str) -> None:
        if where == self.where:
            self.is_there.set()
            await asyncio.Event().wait()


@pytest.mark.parametrize("where", ["begin", "verify"])
@pytest.mark.parametrize("is_cut", [True, False])
async def test_an_episode_is_called_off_wherever_it_is_and_gives_back_what_it_took(where: str, is_cut: bool) -> None:
    env, cutoff, num_open = _Hanging(where), Cutoff(), Echo.num_open
    task = env.make_task("test", 3)
    playing = asyncio.create_task(run_episode(env, ExpertPolicy(), task, episode_id="e", seed=0, cutoff=cutoff))
    await env.is_there.wait()
    if is_cut:
        cutoff.cut("late")
    else:
        playing.cancel()
    await asyncio.wait((playing,))
    assert Echo.num_open == num_open
    if is_cut:
        episode = playing.result()
        assert (episode.outcome, episode.reward) == (Outcome.CANCELLED, None)
        assert episode.failure is not None
        assert (episode.failure.boundary, episode.failure.message) == ("run", "late")
        assert len(episode.turns) == (0 if where == "begin" else 1), "what was played is kept"
    else:
        assert playing.cancelled()


class _OfAnyio(Echo):
    """Holds a task group of anyio from its beginning to its end, which only the task that opened it may close."""

    async def begin(self, task: Task) -> Observation:
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        return await super().begin(task)

    async def end(self) -> None:
        await super().end()
        await self._group.__aexit__(None, None, None)


async def test_an_environment_begins_and_ends_in_one_task(caplog: pytest.LogCaptureFixture) -> None:
    env = _OfAnyio()
    episode = await run_episode(env, ExpertPolicy(), env.make_task("test", 3), episode_id="e", seed=0)
    assert episode.outcome is Outcome.SCORED
    assert caplog.text == ""


class _Stray(Echo):
    """Waits for something that another task cancels."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    async def verify(self) -> Mapping[str, float]:
        await self._stray("verify")
        return await super().verify()

    async def end(self) -> None:
        await super().end()
        await self._stray("end")

    async def _stray(self, where: str) -> None:
        if where == self.where:
            other = asyncio.create_task(asyncio.sleep(60))
            await asyncio.sleep(0)
            other.cancel()
            await other


async def test_what_somebody_else_cancels_is_a_failure_of_ours_and_no_cancellation() -> None:
    env = _Stray("verify")
    async with asyncio.TaskGroup() as tasks:
        play = run_episode(env, ExpertPolicy(), env.make_task("test", 3), episode_id="e", seed=0)
        playing = tasks.create_task(play)
    episode = playing.result()
    assert (episode.outcome, episode.reward) == (Outcome.INFRA_ERROR, None)
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.boundary) == ("StrayCancelError", "env")


async def test_what_somebody_else_cancels_in_an_end_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    env = _Stray("end")
    episode = await run_episode(env, ExpertPolicy(), env.make_task("test", 3), episode_id="e", seed=0)
    assert episode.outcome is Outcome.SCORED
    assert f"could not clean up after {episode.task.id}: CancelledError" in caplog.text
