"""The measurement: parts of the job are started, loaded alone and together for a while, and stopped.

Invariant: whatever happens, every process, environment and temporary folder of the measurement is gone when `measure`
returns or raises, and nothing that was trained is kept.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from palaestra.agents import EnginePolicy, Renderer
from palaestra.agents.engines import open_engine
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError, ungrouped
from palaestra.resources import Resources
from palaestra.trainer._interrupts import interrupts
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.job import Job
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.progress import Bar, Display
from palaestra.trainer.sizing._contention import RolloutBench
from palaestra.trainer.sizing._episodes import Played, Stage, play_some, prompts_of
from palaestra.trainer.sizing._learner_speed import LearnerBench, scratch_config
from palaestra.trainer.sizing._load import EngineProcess, LearnerProcess, Player, Watch, Watched, send_requests
from palaestra.trainer.sizing._measured import EngineLevel, GpuMemory, Measurements, tokens_per_turn
from palaestra.trainer.sizing._model import episode_flow, setting_of
from palaestra.trainer.sync import WeightSync

_PLAY, _ENGINE, _LEARNER, _ROLLOUTS = 0.25, 0.3, 0.15, 0.3
"""Shares of the budget: episodes few at a time, engine levels, learner, rollouts as in training."""

_LEVEL_FACTOR = 4
_NUM_ROUNDS = 2
"""Other work on the machine only ever slows: the better of two rounds is nearer to the engine's own speed."""

_NUM_CANARIES = 2
_BEFORE_FIRST_WEIGHTS = -1
_MIB = 1 << 20


async def measure(job: Job, *, seconds: float, logs: Path, display: Display) -> Measurements:
    """Measure the parts of `job` for about `seconds`, after they have started; their logs go to the folder `logs`.

    Ctrl-C and SIGTERM cancel it. Raises `ConfigError` for what the user can mend, `WorkerError` when a part dies or
    every episode fails.
    """
    with ungrouped(), interrupts():
        async with _open(job, logs, display) as bench:
            with display.bar("measuring", seconds) as bar:
                return await bench.run(seconds, bar)


@asynccontextmanager
async def _open(job: Job, logs: Path, display: Display) -> AsyncIterator[_Bench]:
    """Start engine, learner and environments at once; all of them are closed on leaving."""
    config = job.train
    renderer = open_renderer(job.model, family=config.family)
    suite = job.suite.build().split("train")
    async with Resources() as own:
        start_learner = partial(
            LocalLearner.start, job.model, scratch_config(config.learner), log_path=logs / "size-learner.log"
        )
        start_engine = partial(
            open_engine,
            config.engine,
            job.model,
            config.engine_settings,
            logs / "size-engine.log",
            version=_BEFORE_FIRST_WEIGHTS,
        )
        with display.bar("starting engine, learner and environments", None):
            async with asyncio.TaskGroup() as tasks:
                learner = tasks.create_task(own.get("learner", start_learner))
                engine = tasks.create_task(own.get("engine", start_engine))
                tasks.create_task(_start_environments(suite, own))
        tolerance, every = config.canary_tolerance, config.canary_every
        async with WeightSync(learner.result(), engine.result(), tolerance=tolerance, canary_every=every) as sync:
            yield _Bench(job, suite, renderer, engine.result(), learner.result(), sync, own)


async def _start_environments(suite: EnvSuite, resources: Resources) -> None:
    """Begin one episode of each, which starts the parts that episodes share."""
    for env_id in suite.env_ids:
        env = suite.make(env_id, resources=resources)
        try:
            await env.areset(seed=0, options={"task": env.make_task("train", 0)})
        finally:
            await env.aclose()


class _Bench:
    """The running parts and the phases of the measurement."""

    def __init__(
        self,
        job: Job,
        suite: EnvSuite,
        renderer: Renderer,
        engine: EngineProcess,
        learner: LearnerProcess,
        sync: WeightSync,
        resources: Resources,
    ) -> None:
        self._config = job.train
        self._suite = suite
        self._renderer = renderer
        self._engine = engine
        self._learner = learner
        self._sync = sync
        self._resources = resources
        self._watch = Watch(engine, learner)
        self._canaries: list[list[int]] = []
        self._idle_sync_s: list[float] = []
        policy = EnginePolicy(engine, renderer, job.train.sampling)
        config = job.train
        self._player = Player(suite, policy, resources, group_size=config.group_size, seed=config.seed)

    async def run(self, seconds: float, bar: Bar) -> Measurements:
        """All phases."""
        await self._sync.publish(self._learner.version)
        bar.move_to(0.0, "episodes")
        stage = Stage(self._suite, self._renderer, self._resources, self._config)
        played = await play_some(stage, self._player, self._watch, _PLAY * seconds)
        self._canaries = [t.ids.tolist() for t in played.trajectories[:_NUM_CANARIES]]
        bench = LearnerBench(self._learner, played.trajectories, self._config.learner)
        bar.move_to(_PLAY * seconds, "engine")
        levels, engine_alone, unanswered = await self._measure_engine(played, bench, _ENGINE * seconds)
        bar.move_to((_PLAY + _ENGINE) * seconds, "learner")
        async with self._watch.during() as learner_alone:
            speed = await bench.measure(_LEARNER * seconds)
        await self._publish(bench)
        bar.move_to((1.0 - _ROLLOUTS) * seconds, "rollouts, alone and with learning")
        slots = min(self._config.concurrency, setting_of(self._config).most_slots)
        loads = RolloutBench(self._player, self._watch, bench, lambda: self._publish(bench), slots=slots)
        per_turn = tokens_per_turn(played.work)
        rollouts = await loads.measure(speed, _ROLLOUTS * seconds, tokens_per_turn=per_turn)
        bar.move_to(seconds)
        measured = Measurements(
            player="model" if played.is_model else "expert",
            context=self._engine.max_model_len,
            episodes=played.work,
            engine=levels,
            learner=speed.levels,
            learner_update_s=speed.update_s,
            sync_s=median(self._idle_sync_s),
            busy_sync_s=rollouts.sync_s,
            driver_s=rollouts.alone.driver_s * per_turn / rollouts.alone.tokens,
            engine_slowdown=rollouts.engine_slowdown,
            learner_slowdown=rollouts.learner_slowdown,
            rollout_scatter=rollouts.scatter,
            num_cores=len(os.sched_getaffinity(0)),
            gpu_memory=_gpu_memory(self._config),
            cores={
                "engine alone": engine_alone.cores,
                "learner alone": learner_alone.cores,
                "rollouts alone": rollouts.alone.cores,
                "together": rollouts.together.cores,
            },
            notes=(*played.notes, *unanswered, *speed.notes),
        )
        expected = float(episode_flow(measured, slots)[-1]) * per_turn
        return replace(measured, overhead=max(1.0, expected / rollouts.alone.tokens_per_s))

    async def _publish(self, bench: LearnerBench) -> float:
        """Hand new weights to the engine, as after a step, which also empties its prefix cache; seconds without step.

        The weights are new in number alone: see `LearnerBench`.
        """
        await self._sync.prepare(self._canaries)
        await bench.step(1)
        started_s = time.monotonic()
        await self._sync.publish(self._learner.version)
        return time.monotonic() - started_s

    async def _measure_engine(
        self, played: Played, bench: LearnerBench, seconds: float
    ) -> tuple[tuple[EngineLevel, ...], Watched, list[str]]:
        """Tokens per second at rising concurrencies in two rounds; what was watched at the last; what told nothing."""
        prompts = [prompt for trajectory in played.trajectories for prompt in prompts_of(trajectory)]
        counts = level_counts(self._config.engine_config.max_num_seqs)
        rounds: dict[int, list[float]] = {count: [] for count in counts}
        share_s = seconds / len(counts) / _NUM_ROUNDS
        for count in counts * _NUM_ROUNDS:
            self._idle_sync_s.append(await self._publish(bench))
            watched = await send_requests(
                self._engine,
                prompts,
                self._config.sampling,
                self._renderer.stop_ids,
                self._watch,
                slots=count,
                seconds=share_s,
            )
            rounds[count].append(watched.tokens_per_s)
        levels = levels_of(rounds)
        if not levels:
            raise ConfigError(f"the engine sampled no token in {seconds:.0f} s: give more time with --seconds")
        silent = sorted(rounds.keys() - {level.concurrency for level in levels})
        lost = f"with {', '.join(map(str, silent))} requests at once the engine sampled no token in {share_s:.1f} s"
        return levels, watched, [f"{lost}: give more time with --seconds"] if silent else []


def level_counts(most: int) -> list[int]:
    """Concurrencies to measure: 1, 4, 16 and so on, and `most`."""
    counts = [_LEVEL_FACTOR**power for power in range(16) if _LEVEL_FACTOR**power < most]
    return [*counts, most]


def levels_of(rounds: Mapping[int, Sequence[float]]) -> tuple[EngineLevel, ...]:
    """Best and worst of each concurrency's rounds, in tokens per second; one without a token is left out."""
    return tuple(
        EngineLevel(concurrency=count, tokens_per_s=max(rates), worst_tokens_per_s=min(rates))
        for count, rates in sorted(rounds.items())
        if max(rates) > 0
    )


def _gpu_memory(config: GRPOConfig) -> GpuMemory | None:
    """Memory of a GPU that vLLM and the learner share; None where they do not."""
    is_shared = config.engine == "vllm" and "cpu" not in (config.engine_config.device, config.learner.device)
    if not is_shared or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(total_mb=total / _MIB, free_mb=free / _MIB)
