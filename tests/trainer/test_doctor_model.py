"""Engine against learner, and groups of the model itself: by how much they differ, and what is said of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.agents import Completion, EnginePolicy, Renderer, Sampling
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import PolicyError
from palaestra.resources import Resources
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor import Verdict
from palaestra.trainer.doctor._agreement import Difference, check_agreement, judge_difference
from palaestra.trainer.doctor._far_engine import FarEngine, served
from palaestra.trainer.doctor._variance import SampledGroups, judge_variance, sample_groups
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import Failure, Outcome
from tests.toys import WORDS, Echo, ToyEngine, ToyLearner, call, register_echo
from tests.trainer.test_ledger import make_group

register_echo()
ECHO = "test/Echo-v0"
CONFIG = GRPOConfig.parse({"group_size": 4, "groups_per_step": 2, "concurrency": 8})
TEXTS = [[1, 2, 3, 4], [5, 6]]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    texts = ["say said stop ok wrong", *WORDS] * 3
    return open_renderer(make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=512))


def engine_of(renderer: Renderer, *, delay_s: float = 0.0) -> ToyEngine:
    tools = EnvSuite({ECHO: 1.0}).make(ECHO).tools

    def choose(prompt: Sequence[int], seed: int) -> list[int]:
        has_spoken = list(prompt).count(prompt[-1]) > 1
        return renderer.encode_reply(call("stop") if has_spoken else call("say", word=WORDS[seed % 2]), tools)

    engine = ToyEngine(choose, delay_s=delay_s)
    engine.version = 0
    return engine


async def test_equal_sides_agree_and_unequal_ones_fail_with_the_remedy(renderer: Renderer) -> None:
    engine, learner = engine_of(renderer), ToyLearner()
    finding = await check_agreement(engine, learner, TEXTS, (), CONFIG)
    assert finding.verdict is Verdict.OK
    assert "0 on 4 tokens of conversations" in finding.detail
    engine.wrong_by = 0.5
    finding = await check_agreement(engine, learner, TEXTS, (), CONFIG)
    assert finding.verdict is Verdict.FAILURE
    assert "0.5 on 4" in finding.detail
    assert "dtype" in finding.remedy


async def test_sampled_tokens_are_compared_with_the_learners(renderer: Renderer) -> None:
    trajectory = make_group(0).episodes[0].trajectory
    assert trajectory is not None
    finding = await check_agreement(engine_of(renderer), ToyLearner(), (), [trajectory], CONFIG)
    assert finding.verdict is Verdict.FAILURE
    assert "0.75 on 2 sampled tokens" in finding.detail  # it recorded -0.25 and -1.5, the learner says -1


async def test_nothing_to_compare_on_is_skipped(renderer: Renderer) -> None:
    finding = await check_agreement(engine_of(renderer), ToyLearner(), (), (), CONFIG)
    assert finding.verdict is Verdict.SKIPPED


def test_difference_near_the_tolerance_is_a_warning_and_nan_a_failure() -> None:
    assert judge_difference({"tokens": Difference(0.04, 0.01, 9)}, CONFIG).verdict is Verdict.OK
    assert judge_difference({"tokens": Difference(0.4, 0.01, 9)}, CONFIG).verdict is Verdict.WARNING
    assert judge_difference({"tokens": Difference(0.04, 0.04, 9)}, CONFIG).verdict is Verdict.WARNING
    assert judge_difference({"tokens": Difference(0.6, 0.01, 9)}, CONFIG).verdict is Verdict.FAILURE
    assert judge_difference({"tokens": Difference(0.06, 0.06, 9)}, CONFIG).verdict is Verdict.FAILURE
    assert judge_difference({"tokens": Difference(float("nan"), 0.0, 9)}, CONFIG).verdict is Verdict.FAILURE


async def test_groups_are_those_that_the_run_would_play(renderer: Renderer) -> None:
    num_open = Echo.num_open
    policy = EnginePolicy(engine_of(renderer), renderer, CONFIG.sampling)
    async with Resources() as resources:
        groups = await sample_groups(policy, EnvSuite({ECHO: 1.0}), CONFIG, resources, 30.0)
    assert {len(group) for group in groups.episodes.values()} == {4}
    assert len(groups.all()) == 24
    assert Echo.num_open == num_open
    finding = judge_variance(groups, CONFIG, is_new=False)
    assert finding.verdict is Verdict.OK
    assert "of 24 episodes" in finding.detail


async def test_engine_of_another_process_answers_as_it_does_here(renderer: Renderer, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)  # the path of a socket has 107 bytes at most
    folder.mkdir()
    engine = engine_of(renderer)
    async with served(engine, folder) as socket:
        far = FarEngine(socket, engine.max_model_len)
        ours, theirs = [await each.generate([1, 2, 3], Sampling(), stop_ids=(2,), seed=1) for each in (engine, far)]
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert [scores.tolist() for scores in await far.score(TEXTS)] == [s.tolist() for s in await engine.score(TEXTS)]
        assert await far.stats() == await engine.stats()
    with pytest.raises(OSError, match="directory"):
        await far.generate([1], Sampling(), stop_ids=(2,))


async def test_errors_of_a_far_engine_arrive_as_themselves(renderer: Renderer, tmp_path: Path) -> None:
    class Full(ToyEngine):
        async def generate(self, *args: object, **options: object) -> Completion:
            raise PolicyError("the queue is full")

    async with served(Full(lambda prompt, seed: []), tmp_path) as socket:
        with pytest.raises(PolicyError, match="the queue is full"):
            await FarEngine(socket, 99).generate([1], Sampling(), stop_ids=(2,))


async def test_request_that_is_left_is_cancelled_at_the_engine(tmp_path: Path) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    class Slow(ToyEngine):
        async def generate(self, *args: object, **options: object) -> Completion:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            raise AssertionError

    async with asyncio.timeout(30), served(Slow(lambda prompt, seed: []), tmp_path) as socket:
        asking = asyncio.create_task(FarEngine(socket, 99).generate([1], Sampling(), stop_ids=(2,)))
        await begun.wait()
        asking.cancel()
        await cancelled.wait()


async def test_engine_that_is_too_slow_leaves_what_ended_in_time(renderer: Renderer) -> None:
    num_open = Echo.num_open
    policy = EnginePolicy(engine_of(renderer, delay_s=60.0), renderer, CONFIG.sampling)
    async with Resources() as resources:
        groups = await sample_groups(policy, EnvSuite({ECHO: 1.0}), CONFIG, resources, 0.1)
    assert Echo.num_open == num_open
    finding = judge_variance(groups, CONFIG, is_new=False)
    assert finding.verdict is Verdict.WARNING
    assert "no episode ended in time" in finding.detail


def group_of(*rewards: float | None) -> SampledGroups:
    episode = make_group(0).episodes[0]
    failure = Failure(kind="SandboxError", message="no box", boundary="env")
    episodes = [
        replace(episode, outcome=Outcome.INFRA_ERROR, reward=None, terms=(), facts={}, failure=failure)
        if reward is None
        else replace(episode, outcome=Outcome.SCORED, reward=reward, facts={"success": float(reward >= 1)})
        for reward in rewards
    ]
    return SampledGroups({0: episodes})


def test_groups_without_variance_do_not_move_grpo() -> None:
    finding = judge_variance(group_of(0.0, 0.0, 0.0, 0.0), CONFIG, is_new=False)
    assert finding.verdict is Verdict.WARNING
    assert "GRPO does not move" in finding.detail
    assert "imitation first" in finding.remedy
    solved = judge_variance(group_of(1.0, 1.0, 1.0, 1.0), CONFIG, is_new=False)
    assert "harder tasks" in solved.remedy
    assert judge_variance(group_of(0.0, 1.0, 0.0, 0.0), CONFIG, is_new=False).verdict is Verdict.OK


@pytest.mark.parametrize("is_new", [False, True])
def test_no_group_with_two_rewards_tells_nothing(is_new: bool) -> None:
    config = CONFIG.model_copy(update={"max_failure_rate": 1.0})
    finding = judge_variance(group_of(None, None, None, 1.0), config, is_new=is_new)
    assert finding.verdict is Verdict.WARNING
    assert "nothing is known of variance" in finding.detail


def test_of_a_model_before_imitation_it_is_only_told() -> None:
    finding = judge_variance(group_of(0.0, 0.0, 0.0, 0.0), CONFIG, is_new=True)
    assert finding.verdict is Verdict.OK
    assert "100% of 1 groups have equal rewards" in finding.detail
    assert "for information" in finding.detail


def test_failures_of_ours_are_no_variance() -> None:
    finding = judge_variance(group_of(None, None, 1.0, 0.0), CONFIG, is_new=False)
    assert finding.verdict is Verdict.FAILURE
    assert "SandboxError: no box" in finding.detail


def test_conversations_are_cut_to_the_context(tmp_path: Path, renderer: Renderer) -> None:
    from palaestra.trainer.doctor._agreement import conversations

    assert conversations({}, renderer, 16) == []
