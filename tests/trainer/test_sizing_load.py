"""Loads on toy parts: they end in time, count what was sampled, and do not prefer short episodes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from palaestra.agents import EnginePolicy, EngineStats, Sampling
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError, WorkerError
from palaestra.resources import Resources
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import LearnerConfig, StepReport
from palaestra.trainer.sizing._contention import RolloutBench, Rollouts
from palaestra.trainer.sizing._episodes import Played, Stage, inputs_of, play_some, prompts_of
from palaestra.trainer.sizing._learner_speed import LearnerBench, LearnerSpeed, micro_batch_sizes, scratch_config
from palaestra.trainer.sizing._load import Player, Watch, send_requests
from palaestra.trainer.sizing._measured import LearnerLevel
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import Trajectory
from tests.toys import WORDS, Chooser, Echo, ToyEngine, ToyLearner, call, register_echo

register_echo()


class OwnEngine(ToyEngine):
    """Counts as this process."""

    pid = os.getpid()


class CountedEngine(OwnEngine):
    """Says in `order` when it was asked for its counts: a watch does so when it begins and when it ends."""

    def __init__(self, choose: Chooser, *, delay_s: float = 0.0) -> None:
        super().__init__(choose, delay_s=delay_s)
        self.order: list[str] = []

    async def stats(self) -> EngineStats:
        self.order.append("counts")
        return await super().stats()


class OwnLearner(ToyLearner):
    """Counts as this process; refuses batches of more than `most` rows, and dies when told to."""

    pid = os.getpid()
    most = 1000
    is_dead = False

    async def step(self, rows: Sequence[TrainRow]) -> StepReport:
        if len(rows) > self.most or self.is_dead:
            raise WorkerError("out of memory")
        return await super().step(rows)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
        if self.is_dead:
            raise WorkerError("learner was killed by SIGKILL")
        return []


def trajectory(mask: Sequence[int]) -> Trajectory:
    loss_mask = np.array(mask, np.bool_)
    return Trajectory(
        ids=np.arange(len(mask), dtype=np.int32),
        loss_mask=loss_mask,
        logprobs=np.zeros(len(mask), np.float32),
        versions=np.where(loss_mask, 3, -1).astype(np.int32),
        turns=np.zeros(len(mask), np.int16),
    )


def test_prompts_are_what_stood_before_each_reply() -> None:
    two_turns = trajectory([0, 0, 1, 1, 0, 1, 0])
    assert prompts_of(two_turns) == [[0, 1], [0, 1, 2, 3, 4]]
    assert inputs_of(two_turns) == 5


async def test_requests_are_counted_while_they_run() -> None:
    engine = OwnEngine(lambda prompt, seed: [1, 2, 3], delay_s=0.001)
    watch = Watch(engine, OwnLearner())
    async with asyncio.timeout(10):
        watched = await send_requests(engine, [[1], [2]], Sampling(max_tokens=8), (0,), watch, slots=3, seconds=0.2)
    assert watched.tokens > 0
    assert watched.tokens_per_s == pytest.approx(watched.tokens / watched.seconds)
    assert {"engine", "learner", "driver", "environments", "others"} == watched.cores.keys()


async def test_an_engine_that_dies_ends_the_load_at_once() -> None:
    def die(prompt: Sequence[int], seed: int) -> list[int]:
        raise WorkerError("vllm engine was killed by SIGKILL")

    engine = OwnEngine(die)
    with pytest.raises(ExceptionGroup, match="unhandled") as caught:
        async with asyncio.timeout(10):
            await send_requests(engine, [[1]], Sampling(), (0,), Watch(engine, OwnLearner()), slots=2, seconds=60.0)
    assert caught.group_contains(WorkerError, match="SIGKILL")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["say said stop ok wrong", *WORDS] * 3
    return make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


async def test_episodes_are_groups_of_one_task_and_all_are_ended(tokenizer: Path) -> None:
    suite = EnvSuite({"test/Echo-v0": 1.0})
    renderer = open_renderer(tokenizer)
    tools = suite.make("test/Echo-v0").tools
    engine = OwnEngine(lambda prompt, seed: renderer.encode_reply(call("stop"), tools), delay_s=0.002)
    engine.version = 0
    num_open = Echo.num_open
    async with asyncio.timeout(20), Resources() as own:
        player = Player(suite, EnginePolicy(engine, renderer, Sampling(max_tokens=16)), own, group_size=2, seed=0)
        watch = Watch(engine, OwnLearner())
        first, watched = await player.play(watch, slots=3, seconds=0.3)
        second, _ = await player.play(watch, slots=3, seconds=0.2)
    assert Echo.num_open == num_open
    assert watched.tokens > 0
    numbers = [int(episode.id) for episode in first]
    assert numbers == list(range(len(numbers))), "no episode that was overtaken by shorter ones is missing"
    assert {e.task.id for e in first[:2]} == {first[0].task.id}
    assert int(second[0].id) > numbers[-1], "a later load plays other tasks"


async def played(tokenizer: Path, *, fault: str = "", delay_s: float = 0.002, seconds: float = 0.3) -> Played:
    suite = EnvSuite({"test/Echo-v0": 1.0}, options={"test/Echo-v0": {"fault": fault}})
    renderer = open_renderer(tokenizer)
    tools = suite.make("test/Echo-v0").tools
    engine = OwnEngine(lambda prompt, seed: renderer.encode_reply(call("stop"), tools), delay_s=delay_s)
    engine.version = 0
    config = GRPOConfig(group_size=2)
    async with asyncio.timeout(20), Resources() as own:
        policy = EnginePolicy(engine, renderer, Sampling(max_tokens=16))
        player = Player(suite, policy, own, group_size=2, seed=0)
        return await play_some(Stage(suite, renderer, own, config), player, Watch(engine, OwnLearner()), seconds)


async def test_the_models_own_episodes_are_measured(tokenizer: Path) -> None:
    found = await played(tokenizer)
    assert found.is_model
    assert {work.num_turns for work in found.work} == {1}
    assert [work.num_sampled for work in found.work] == [t.num_sampled for t in found.trajectories]


async def test_the_expert_plays_where_the_model_is_too_slow(tokenizer: Path) -> None:
    found = await played(tokenizer, delay_s=60.0, seconds=0.05)
    assert not found.is_model
    assert {work.num_turns for work in found.work} == {2}, "it says the word, then stops"
    assert "fewer than 2 episodes of the model ended" in found.notes[0]


async def test_environments_that_fail_end_the_measurement_with_their_reason(tokenizer: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await played(tokenizer, fault="begin", seconds=10.0)
    assert caught.group_contains(WorkerError, match="16 episodes in a row failed on our side, in test/Echo-v0: Sandbox")


async def test_a_learner_is_timed_in_each_size_without_learning() -> None:
    config = LearnerConfig(max_micro_batch_tokens=80)
    assert micro_batch_sizes(config) == [20, 40, 80, 160]
    scratch = scratch_config(config)
    assert scratch.max_micro_batch_tokens == 160
    assert scratch.learning_rate < 1e-20
    learner = OwnLearner(delay_s=0.001)
    bench = LearnerBench(learner, [trajectory([0] * 20 + [1])], config)
    speed = await bench.measure(0.1)
    assert [level.tokens for level in speed.levels] == [20, 40, 80, 160]
    assert all(level.token_s > 0 for level in speed.levels)
    assert {row.trajectory.oldest_version for batch in learner.batches for row in batch} == {0}


async def test_a_size_that_does_not_fit_ends_the_search_with_a_note() -> None:
    learner = OwnLearner()
    learner.most = 2
    speed = await LearnerBench(learner, [trajectory([0] * 20 + [1])], LearnerConfig(max_micro_batch_tokens=80)).measure(
        0.01
    )
    assert [level.tokens for level in speed.levels] == [20, 40]
    assert speed.notes == ("micro-batches of 80 tokens do not fit: out of memory",)


async def test_a_learner_that_dies_ends_the_measurement() -> None:
    learner = OwnLearner()
    learner.is_dead = True
    bench = LearnerBench(learner, [trajectory([0] * 20 + [1])], LearnerConfig())
    with pytest.raises(WorkerError):
        await bench.measure(0.01)


async def loaded(tokenizer: Path, engine: CountedEngine, *, tokens_per_turn: float) -> Rollouts:
    suite = EnvSuite({"test/Echo-v0": 1.0})
    renderer = open_renderer(tokenizer)
    engine.version = 0
    speed = LearnerSpeed(update_s=0.0, levels=(LearnerLevel(tokens=20, token_s=1e-3),), notes=())

    async def publish() -> float:
        engine.order.append("sync")
        await asyncio.sleep(0.01)
        return 7.0

    async with asyncio.timeout(20), Resources() as own:
        player = Player(suite, EnginePolicy(engine, renderer, Sampling(max_tokens=16)), own, group_size=2, seed=0)
        learner = OwnLearner(delay_s=0.001)
        steps = LearnerBench(learner, [trajectory([0] * 20 + [1])], LearnerConfig())
        bench = RolloutBench(player, Watch(engine, learner), steps, publish, slots=2)
        return await bench.measure(speed, 1.0, tokens_per_turn=tokens_per_turn)


def stopping(tokenizer: Path) -> CountedEngine:
    renderer = open_renderer(tokenizer)
    tools = EnvSuite({"test/Echo-v0": 1.0}).make("test/Echo-v0").tools
    return CountedEngine(lambda prompt, seed: renderer.encode_reply(call("stop"), tools), delay_s=0.002)


async def test_weight_syncs_are_measured_in_their_own_seconds(tokenizer: Path) -> None:
    engine = stopping(tokenizer)
    found = await loaded(tokenizer, engine, tokens_per_turn=1.0)
    assert found.sync_s == 7.0
    assert found.engine_slowdown >= 1
    first_sync = engine.order.index("sync")
    assert engine.order[:first_sync].count("counts") >= 2 * 2 * 2, (
        "two rounds alone and two beside the learner are over"
    )
    assert set(engine.order[:first_sync]) == {"counts"}


async def test_rounds_of_rollouts_that_differ_are_told_by_how_much(tokenizer: Path) -> None:
    engine = stopping(tokenizer)
    counts = engine.stats

    async def count_and_tire() -> EngineStats:
        if "counts" in engine.order:  # the first round has begun
            engine.delay_s *= 2
        return await counts()

    engine.stats = count_and_tire  # type: ignore[method-assign]
    assert (await loaded(tokenizer, engine, tokens_per_turn=1.0)).scatter > 0.3


async def test_rollouts_without_a_turn_are_no_measurement(tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=r"was sampled in 0\.2 s: give more time with --seconds"):
        await loaded(tokenizer, stopping(tokenizer), tokens_per_turn=1e6)
    silent = stopping(tokenizer)
    silent.delay_s = 60.0
    with pytest.raises(ConfigError, match="no turn of a rollout"):
        await loaded(tokenizer, silent, tokens_per_turn=1.0)
