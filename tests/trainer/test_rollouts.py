"""Stragglers are cut: the group goes on without them, they keep what they played, and count as nobody's failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from palaestra.agents import Completion, EnginePolicy, Sampling
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import WorkerError, leaves
from palaestra.resources import Resources
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.rollouts import LATE, SPARE, RolloutPlan, RolloutWorkers, most_groups_in_hand, most_in_hand
from palaestra.trainer.rows import is_trainable, make_rows, objection_to
from palaestra.trainer.sampler import TaskSampler
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import Episode, Group, Outcome
from tests.toys import WORDS, Chooser, Echo, ToyEngine, call, pass_time, register_echo

register_echo()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["say said stop ok wrong", *WORDS] * 3
    return make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


def _has_spoken(prompt: Sequence[int]) -> bool:
    return list(prompt).count(prompt[-1]) > 1  # the assistant's header a second time


class _Holding(ToyEngine):
    """Answers every first turn and `num_quick` second ones."""

    def __init__(self, choose: Chooser, *, num_quick: int) -> None:
        super().__init__(choose)
        self.version = 0
        self.num_left = num_quick
        self.num_held = 0

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        if _has_spoken(prompt):
            self.num_left -= 1
            if self.num_left < 0:
                self.num_held += 1
                await asyncio.Event().wait()
        return await super().generate(prompt, sampling, stop_ids=stop_ids, seed=seed)


class Play:
    """Workers over a toy engine that lets the first `num_quick` episodes of each group end, and holds the others."""

    def __init__(self, folder: Path, tokenizer: Path, config: GRPOConfig, *, num_quick: int) -> None:
        self.folder = folder
        self.config = config
        self.suite = EnvSuite({"test/Echo-v0": 1.0}, options={"test/Echo-v0": {"limits": {"episode_s": 600.0}}})
        self.renderer = open_renderer(tokenizer)
        self.groups: asyncio.Queue[tuple[int, Group]] = asyncio.Queue()
        self.num_quick = num_quick

    async def put(self, number: int, group: Group) -> None:
        self.groups.put_nowait((number, group))

    def choose(self, prompt: Sequence[int], seed: int) -> list[int]:
        tools = self.suite.make("test/Echo-v0").tools
        return self.renderer.encode_reply(call("stop") if _has_spoken(prompt) else call("say", word="ant"), tools)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[RolloutWorkers, Ledger]]:
        config = self.config
        ledger = await Ledger.open(self.folder, meta={})
        plan = RolloutPlan(
            group_size=config.group_size,
            max_groups_in_hand=most_groups_in_hand(groups_per_step=config.groups_per_step, max_lag=config.max_lag),
            concurrency=config.concurrency,
            seed=0,
            max_failure_rate=0.0,
            max_invalid_rate=0.0,
            group_timeout_s=config.group_timeout_s,
            is_valid=lambda outcome: is_trainable(outcome, config),
            num_spare=config.num_spare,
        )
        self.engine = _Holding(self.choose, num_quick=self.num_quick)
        policy = EnginePolicy(self.engine, self.renderer, Sampling(max_tokens=16))
        async with Resources() as resources:
            sampler = TaskSampler(self.suite, seed=0)
            workers = RolloutWorkers(self.suite, policy, sampler, ledger, resources, plan, on_group=self.put)
            try:
                yield workers, ledger
            finally:
                await ledger.aclose()

    async def first(self, *, num_held: int | None = None) -> tuple[Group, list[Episode]]:
        """The first group, and what the ledger has of it; late once the quick ones ended and `num_held` hang."""
        num_open = Echo.num_open
        async with self.open() as (workers, ledger):
            running = asyncio.create_task(workers.run())
            async with asyncio.timeout(60):
                if num_held is not None:
                    while (await ledger.balance()).episodes_ended < self.num_quick or self.engine.num_held < num_held:
                        await asyncio.sleep(0)
                    pass_time(self.config.group_timeout_s)
            async with asyncio.timeout(60):
                number, group = await self.groups.get()
            running.cancel()
            await asyncio.wait((running,))
            assert running.cancelled(), "what was cut is no failure that stops the run"
            assert workers.num_generating == 0
            [(recorded, same)] = await ledger.finished()
            assert recorded == number
        assert Echo.num_open == num_open, "what was cut is closed too"
        return group, list(same.episodes)

    async def many(self, count: int) -> list[str]:
        """The outcomes of `count` groups, one after another."""
        played: list[str] = []
        async with asyncio.timeout(30), self.open() as (workers, _), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(workers.run())
            for _ in range(count):
                played += outcomes((await self.groups.get())[1])
                self.engine.num_left = self.num_quick
                await workers.release(1)
            running.cancel()
        return played


def config(**changes: object) -> GRPOConfig:
    values = {"mode": "sync", "group_size": 3, "num_spare": 2, "groups_per_step": 1, "concurrency": 8}
    return GRPOConfig.parse(values | changes)


def outcomes(group: Group) -> list[str]:
    return sorted(episode.outcome.value for episode in group.episodes)


async def test_spares_are_cut_once_enough_ended_and_keep_their_turns(tmp_path: Path, tokenizer: Path) -> None:
    settings = config()
    group, recorded = await Play(tmp_path, tokenizer, settings, num_quick=3).first()
    assert outcomes(group) == ["cancelled"] * 2 + ["scored"] * 3
    cut = [episode for episode in recorded if episode.outcome is Outcome.CANCELLED]
    for episode in cut:
        assert episode.reward is None
        assert episode.failure is not None
        assert episode.failure.message == SPARE
        assert len(episode.turns) == 1
        assert episode.trajectory is not None
        assert episode.trajectory.num_sampled > 0
    assert len(make_rows([group], settings)) == 3, "what was cut is not trained"
    assert objection_to(group, settings) is None


async def test_a_group_at_its_deadline_goes_on_with_those_that_ended(tmp_path: Path, tokenizer: Path) -> None:
    settings = config(num_spare=0)
    group, _ = await Play(tmp_path, tokenizer, settings, num_quick=2).first(num_held=1)
    assert outcomes(group) == ["cancelled", "scored", "scored"]
    assert {e.failure.message for e in group.episodes if e.failure} == {LATE}
    assert objection_to(group, settings) is None


async def test_a_group_with_too_few_at_its_deadline_is_late(tmp_path: Path, tokenizer: Path) -> None:
    settings = config()
    group, _ = await Play(tmp_path, tokenizer, settings, num_quick=1).first(num_held=4)
    assert outcomes(group) == ["cancelled"] * 4 + ["scored"]
    assert objection_to(group, settings) == "late"


async def test_episodes_that_wait_for_their_turn_when_the_group_is_cut_never_begin(
    tmp_path: Path, tokenizer: Path
) -> None:
    settings = config(concurrency=1, num_spare=0)
    group, _ = await Play(tmp_path, tokenizer, settings, num_quick=0).first(num_held=1)
    assert outcomes(group) == ["cancelled"] * 3
    assert sorted(len(episode.turns) for episode in group.episodes) == [0, 0, 1]
    assert objection_to(group, settings) == "late"


async def test_an_environment_that_always_hangs_ends_the_run(tmp_path: Path, tokenizer: Path) -> None:
    settings = config(group_timeout_s=0.02)
    with pytest.raises(ExceptionGroup) as caught:
        await Play(tmp_path, tokenizer, settings, num_quick=0).many(20)
    errors = [error for error in leaves(caught.value) if isinstance(error, WorkerError)]
    assert "64 of the last 64 episodes got no advantage (64 late)" in str(errors[0])
    assert "group_timeout_s" in str(errors[0]), "what to raise"


async def test_spares_that_are_cut_never_end_the_run(tmp_path: Path, tokenizer: Path) -> None:
    settings = config(num_spare=7, concurrency=16)
    played = await Play(tmp_path, tokenizer, settings, num_quick=3).many(40)
    assert played.count("scored") == 120
    assert played.count("cancelled") == 280, "most of those of the last 64"


async def test_with_slots_to_spare_all_that_may_be_in_hand_is_played_at_once(tmp_path: Path, tokenizer: Path) -> None:
    settings = config(mode="async", max_lag=2, groups_per_step=2, num_spare=1, concurrency=64)
    most = most_in_hand(group_size=3, groups_per_step=2, max_lag=2, num_spare=1)
    assert most == 2 * 3 * 4
    async with Play(tmp_path, tokenizer, settings, num_quick=0).open() as (workers, _):
        running = asyncio.create_task(workers.run())
        async with asyncio.timeout(30):
            while workers.num_generating < most:
                await asyncio.sleep(0.01)
        for _ in range(100):
            await asyncio.sleep(0)
        assert workers.num_generating == most
        running.cancel()
        await asyncio.wait((running,))
