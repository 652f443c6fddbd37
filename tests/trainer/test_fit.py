"""The loop with toy parts: bounded lag, no group lost or trained twice, typed failures, resume."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from palaestra.agents import Completion, EnginePolicy, Sampling
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import PalaestraError, WorkerError, leaves
from palaestra.resources import Resources
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.buffer import ReplayBuffer
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.fit import Fit, Parts
from palaestra.trainer.learner import LearnerConfig, StepReport
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.metrics import StepRecord
from palaestra.trainer.resume import resume
from palaestra.trainer.rollouts import RolloutPlan, RolloutWorkers, most_groups_in_hand
from palaestra.trainer.rows import is_trainable, objection_to
from palaestra.trainer.sampler import TaskSampler
from palaestra.trainer.stalls import ProcessPart, Stalls
from palaestra.trainer.sync import WeightSync
from palaestra.trainer.tiny import make_tokenizer
from tests.toys import WORDS, Chooser, Echo, ToyEngine, ToyLearner, call, pass_time, register_echo

register_echo()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["say said stop ok wrong", *WORDS] * 3
    return make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


class Run:
    """The parts of a fit over toys, opened as the trainer opens them."""

    def __init__(self, folder: Path, tokenizer: Path, config: GRPOConfig, *, fault: str = "") -> None:
        self.folder = folder
        self.config = config
        self.suite = EnvSuite({"test/Echo-v0": 1.0}, options={"test/Echo-v0": {"fault": fault}})
        self.renderer = open_renderer(tokenizer)
        self.engine = ToyEngine(self.choose)
        self.learner = ToyLearner()
        self.records: list[StepRecord] = []
        self.notes: list[str] = []
        self.say: Callable[[str], None] = self.notes.append
        self.processes: list[ProcessPart] = []
        self.stop_after: int | None = None

    async def note(self, line: str) -> None:
        self.notes.append(line)

    async def open_learner(self, config: LearnerConfig) -> ToyLearner:
        return self.learner

    def choose(self, prompt: Sequence[int], seed: int) -> list[int]:
        tools = self.suite.make("test/Echo-v0").tools
        has_spoken = list(prompt).count(prompt[-1]) > 1  # the assistant's header a second time
        word = WORDS[seed % 2]
        return self.renderer.encode_reply(call("stop") if has_spoken else call("say", word=word), tools)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Fit]:
        config = self.config
        async with AsyncExitStack() as stack:
            resources = await stack.enter_async_context(Resources())
            self.ledger = await resources.get("ledger", partial(Ledger.open, self.folder, meta={}))
            checkpoints = Checkpoints(self.folder / "checkpoints")
            await resume(
                self.ledger,
                checkpoints,
                config.learner,
                save_every=config.save_every,
                open_learner=self.open_learner,
                say=self.note,
            )
            await self.ledger.use_config(config.model_dump(mode="json"))
            self.buffer = ReplayBuffer(max_lag=config.max_lag, objection=partial(objection_to, config=config))
            sampler = TaskSampler(self.suite, seed=config.seed, next_number=await self.ledger.next_number())
            policy = EnginePolicy(self.engine, self.renderer, Sampling(max_tokens=16))
            plan = RolloutPlan(
                group_size=config.group_size,
                max_groups_in_hand=most_groups_in_hand(groups_per_step=config.groups_per_step, max_lag=config.max_lag),
                concurrency=config.concurrency,
                seed=config.seed,
                max_failure_rate=config.max_failure_rate,
                max_invalid_rate=config.max_invalid_rate,
                group_timeout_s=config.group_timeout_s,
                is_valid=partial(is_trainable, config=config),
                num_spare=config.num_spare,
            )
            self.rollouts = rollouts = RolloutWorkers(
                self.suite, policy, sampler, self.ledger, resources, plan, on_group=self.buffer.put
            )
            sync = WeightSync(self.learner, self.engine, tolerance=1e-3, canary_every=1)
            await stack.enter_async_context(sync)
            await sync.publish(self.learner.version)
            self.stalls = Stalls(
                folder=self.folder / "logs",
                report_s=config.stall_report_s,
                processes=self.processes,
                say=self.say,
                facts=lambda: [f"{rollouts.num_generating} episodes are running", *rollouts.describe()],
            )
            await stack.enter_async_context(self.stalls.watching())
            parts = Parts(
                config=config,
                learner=self.learner,
                engine=self.engine,
                sync=sync,
                ledger=self.ledger,
                buffer=self.buffer,
                rollouts=rollouts,
                checkpoints=checkpoints,
                stalls=self.stalls,
            )
            fit = Fit(parts, on_step=self.see)
            self.stop = fit.stop
            yield fit

    def see(self, record: StepRecord) -> None:
        self.records.append(record)
        if record.step == self.stop_after:
            self.stop()

    async def train(self) -> None:
        async with asyncio.timeout(30), self.open() as fit:
            await fit.train()
            balance = await self.ledger.balance()
            assert balance.trained == self.learner.version * self.config.groups_per_step


def config(**changes: object) -> GRPOConfig:
    values = {"steps": 6, "group_size": 4, "groups_per_step": 2, "max_lag": 1, "concurrency": 8, "save_every": 2}
    return GRPOConfig.parse(values | changes)


@pytest.mark.parametrize("lag", [{"mode": "sync", "max_lag": 0}, {"max_lag": 1}, {"max_lag": 2}])
async def test_no_trained_token_is_older_than_max_lag(tmp_path: Path, tokenizer: Path, lag: dict[str, object]) -> None:
    run = Run(tmp_path, tokenizer, config(**lag))
    await run.train()
    assert [record.step for record in run.records] == [1, 2, 3, 4, 5, 6]
    for step, batch in enumerate(run.learner.batches):
        oldest = min(row.trajectory.oldest_version for row in batch)
        assert step - oldest <= run.config.max_lag
    assert max(record.lag_max for record in run.records) <= run.config.max_lag


async def test_async_runs_ahead_and_sync_does_not(tmp_path: Path, tokenizer: Path) -> None:
    ahead = Run(tmp_path / "async", tokenizer, config(max_lag=2))
    ahead.learner.delay_s = 0.02
    await ahead.train()
    behind = Run(tmp_path / "sync", tokenizer, config(mode="sync", max_lag=0))
    behind.learner.delay_s = 0.02
    await behind.train()
    assert max(record.lag_max for record in ahead.records) >= 1
    assert {record.lag_max for record in behind.records} == {0}


async def test_one_step_plays_each_batch_with_one_version_while_the_one_before_is_learned(
    tmp_path: Path, tokenizer: Path
) -> None:
    run = Run(tmp_path, tokenizer, config(mode="one-step"))
    run.learner.delay_s = 0.02
    run.engine.delay_s = 0.005
    await run.train()
    assert [record.lag_max for record in run.records] == [0, 1, 1, 1, 1, 1]
    for step, batch in enumerate(run.learner.batches):
        versions = {int(v) for row in batch for v in row.trajectory.versions[row.trajectory.loss_mask]}
        assert versions == {max(0, step - 1)}, "no swap in the middle of an episode"


async def test_sync_steps_do_not_depend_on_who_was_last(tmp_path: Path, tokenizer: Path) -> None:
    runs = [Run(tmp_path / str(k), tokenizer, config(mode="sync", max_lag=0, steps=3)) for k in range(2)]
    runs[1].engine.jitter = np.random.default_rng(0)
    for run in runs:
        await run.train()
    for one, other in zip(runs[0].learner.batches, runs[1].learner.batches, strict=True):
        assert [row.trajectory for row in one] == [row.trajectory for row in other]


async def test_a_run_that_stops_does_not_wait_for_scores_that_nobody_needs(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(steps=2))
    others, step, score = asyncio.all_tasks(), run.learner.step, run.engine.score

    async def stop_and_step(rows: Sequence[TrainRow]) -> StepReport:
        run.stop()
        return await step(rows)

    async def score_the_first(sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        if run.engine.loaded == [0] and len(sequences) > 1:
            await asyncio.Event().wait()
        return await score(sequences)

    run.learner.step, run.engine.score = stop_and_step, score_the_first  # type: ignore[method-assign]
    await run.train()
    assert run.learner.version == 1
    assert asyncio.all_tasks() == others


async def test_a_step_is_on_record_before_its_weights_leave(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(steps=2))
    seen: list[tuple[int, int]] = []
    load = run.engine.load_weights

    async def load_and_look(folder: Path, version: int, checksum: str | None = None) -> None:
        seen.append((version, await run.ledger.last_step()))
        await load(folder, version, checksum)

    run.engine.load_weights = load_and_look  # type: ignore[method-assign]
    await run.train()
    assert seen == [(0, 0), (1, 1), (2, 2)]


async def test_episodes_are_in_the_ledger_before_they_are_dispatched(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(steps=2))
    choose, missing = run.engine.choose, []

    def choose_and_look(prompt: Sequence[int], seed: int) -> list[int]:
        with sqlite3.connect(f"file:{tmp_path / 'ledger.sqlite'}?mode=ro", uri=True) as connection:
            (issued,) = connection.execute("SELECT COUNT(*) FROM episodes").fetchone()
        connection.close()
        groups = {line.split()[1].partition(".")[0] for line in run.rollouts.describe()}
        if issued < 4 * len(groups):
            missing.append(issued)
        return choose(prompt, seed)

    run.engine.choose = choose_and_look
    await run.train()
    assert not missing


async def test_weights_reach_the_engine_in_order_once_each(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config())
    await run.train()
    assert run.engine.loaded == [0, 1, 2, 3, 4, 5, 6]


async def test_engine_with_other_weights_stops_the_run(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config())
    run.engine.wrong_by = 0.5
    with pytest.raises(WorkerError, match=r"version 0 engine and learner disagree by 0\.5"):
        await run.train()
    assert run.learner.batches == []


async def test_weights_that_go_wrong_later_stop_the_run(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config())
    async with run.open() as fit:
        run.engine.wrong_by = 0.5
        with pytest.raises(ExceptionGroup) as caught:
            await fit.train()
    assert any("disagree by 0.5" in str(error) for error in leaves(caught.value))
    assert len(run.learner.batches) == 1


async def test_failures_of_ours_stop_the_run_instead_of_becoming_zeros(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(), fault="verify")
    with pytest.raises(ExceptionGroup) as caught:
        await run.train()
    messages = [str(error) for error in leaves(caught.value) if isinstance(error, PalaestraError)]
    assert "failed on our side" in messages[0]
    assert "the judge is gone" in messages[0]
    assert run.learner.batches == []


async def test_a_wait_without_end_is_a_named_stall(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(step_timeout_s=0.2))
    run.engine.delay_s = 60.0
    num_open = Echo.num_open
    with pytest.raises(ExceptionGroup) as caught:
        await run.train()
    assert any("the learner waits for rollouts" in str(error) for error in leaves(caught.value))
    assert Echo.num_open == num_open, "cancelled episodes are ended too"


async def test_a_run_that_drops_all_its_groups_says_so_at_its_end(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(step_timeout_s=1000.0, drop_zero_variance=True))
    run.engine.choose = lambda prompt, seed: run.choose(prompt, 0)
    async with run.open() as fit:
        drop = run.ledger.drop

        async def drop_late(number: int, reason: str) -> None:
            await drop(number, reason)
            if number == 3:
                pass_time(1000.0)

        run.ledger.drop = drop_late  # type: ignore[method-assign]
        with pytest.raises(ExceptionGroup) as caught:
            await fit.train()
    messages = [str(error) for error in leaves(caught.value) if isinstance(error, WorkerError)]
    found = re.search(r"(\d+) groups were dropped since the last step \((\d+) zero_variance\); ", messages[0])
    assert found is not None, messages
    assert found[1] == found[2]
    async with run.open():
        dropped = (await run.ledger.balance()).dropped
    assert dropped["zero_variance"] in (int(found[1]), int(found[1]) + 1), "the last one may have been under way"


class Holding(ToyEngine):
    """Answers the first `num_answers` requests, and holds the others."""

    num_answers = 1 << 30

    def __init__(self, choose: Chooser) -> None:
        super().__init__(choose)
        self.is_held = asyncio.Event()

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, stop_ids: Sequence[int], seed: int | None = None
    ) -> Completion:
        self.num_answers -= 1
        if self.num_answers < 0:
            self.is_held.set()
            await asyncio.Event().wait()
        return await super().generate(prompt, sampling, stop_ids=stop_ids, seed=seed)


async def test_a_stop_in_one_step_mode_waits_for_no_rollouts(tmp_path: Path, tokenizer: Path) -> None:
    """Two batches of 8 episodes with two answers each: the second is held after 3 of its episodes."""
    first = Run(tmp_path, tokenizer, config(mode="one-step", concurrency=1))
    first.engine = engine = Holding(first.choose)
    engine.num_answers = 16 + 6
    async with asyncio.timeout(30), first.open() as fit, asyncio.TaskGroup() as tasks:
        training = tasks.create_task(fit.train())
        while not any("the batch being played" in wait.text for wait in first.stalls._waits):
            await asyncio.sleep(0)
        fit.stop()
        await training
        assert await first.ledger.last_step() == 1
        assert (await first.ledger.balance()).episodes_ended == 8 + 3
    assert first.engine.loaded == [0], "no swap in the middle of an episode"
    assert (tmp_path / "checkpoints" / "version-00000001").is_dir()
    second = Run(tmp_path, tokenizer, config(mode="one-step"))
    await second.train()
    assert [record.step for record in second.records] == [2, 3, 4, 5, 6]
    assert [record.lag_max for record in second.records] == [1] * 5
    assert [record.num_versions for record in second.records] == [2, 1, 1, 1, 1], "the batch under way has both"


async def test_episodes_hold_exactly_what_the_engine_sampled(tmp_path: Path, tokenizer: Path) -> None:
    run = Run(tmp_path, tokenizer, config(steps=1))
    await run.train()
    for row in run.learner.batches[0]:
        trajectory = row.trajectory
        assert np.all(trajectory.logprobs[trajectory.loss_mask] == -0.5)
        assert np.all(trajectory.versions[~trajectory.loss_mask] == -1)
        reply = trajectory.ids[trajectory.turns == 1][trajectory.loss_mask[trajectory.turns == 1]]
        assert reply.tolist() == run.renderer.encode_reply(call("stop"), run.suite.make("test/Echo-v0").tools)


def read_plays(folder: Path) -> dict[tuple[int, int], tuple[str, bytes]]:
    """Every episode that ended: its record and tokens."""
    with closing(sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT number, position, record, trajectory FROM plays").fetchall()
    return {(number, position): (record, blob) for number, position, record, blob in rows}


async def test_the_wall_clock_decides_nothing(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It jumps an hour on and two back whenever somebody looks: deadlines, lag, seconds and ledger stay as they are."""
    settings = config(mode="sync", max_lag=0)
    steady, jumping = (Run(tmp_path / name, tokenizer, settings, fault="brief") for name in ("0", "1"))
    await steady.train()
    real, jumps = time.time, itertools.cycle((3600.0, -3600.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    await jumping.train()
    assert jumping.notes == steady.notes == []
    for one, other in zip(steady.learner.batches, jumping.learner.batches, strict=True):
        assert [row.trajectory for row in one] == [row.trajectory for row in other]
    for record in jumping.records:
        assert all(0.0 <= seconds < 60.0 for seconds in (record.wait_s, record.learn_s, record.sync_s))
    plays = [json.loads(record) for record, _ in read_plays(tmp_path / "1").values()]
    assert {play["outcome"] for play in plays} == {"scored"}
    seconds = [s for play in plays for s in (play["wall_s"], *(turn["env_s"] for turn in play["turns"]))]
    assert all(0.0 <= each < 60.0 for each in seconds)
    assert set(read_plays(tmp_path / "1")) >= {(number, position) for number in range(12) for position in range(4)}
