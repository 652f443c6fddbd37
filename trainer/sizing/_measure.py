"""The measurement: parts of the job are started, loaded alone and together for a while, and stopped.

Invariant: whatever happens, every process, environment and temporary folder of the measurement is gone when `measure`
returns or raises, and nothing that was trained is kept.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from palaestra.agents import EnginePolicy, Renderer
from palaestra.agents.engines import open_engine
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError, TaskError, WorkerError, ungrouped
from palaestra.resources import Resources
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.demonstrations import collect, tokenize
from palaestra.trainer.job import Job
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.progress import Bar, Display
from palaestra.trainer.sizing._learner_speed import LearnerBench, LearnerSpeed, scratch_config
from palaestra.trainer.sizing._load import EngineProcess, LearnerProcess, Player, Watch, Watched, send_requests
from palaestra.trainer.sizing._measured import EngineLevel, EpisodeWork, GpuMemory, Measurements
from palaestra.trainer.sizing._model import episode_flow, setting_of
from palaestra.trainer.sizing._trace import inputs_of, prompts_of
from palaestra.trainer.sync import WeightSync
from palaestra.types import Episode, Trajectory

_PLAY, _ENGINE, _LEARNER, _ALONE, _TOGETHER = 0.25, 0.3, 0.15, 0.15, 0.15
"""Shares of the budget: episodes few at a time, engine levels, learner, rollouts as in training, and with learning."""

_FEW_SLOTS = 4
_LEVEL_FACTOR = 4
_NUM_ROUNDS = 2
"""Other work on the machine only ever slows: the better of two rounds is nearer to the engine's own speed."""

_QUIET_CORES = 0.25
_NUM_EXPERT_EPISODES = 8
_ENOUGH_EPISODES = 2
_FEW_EPISODES = 16
_NUM_CANARIES = 2
_BEFORE_FIRST_WEIGHTS = -1
_MIB = 1 << 20


async def measure(job: Job, *, seconds: float, logs: Path, display: Display) -> Measurements:
    """Measure the parts of `job` for about `seconds`, after they have started; their logs go to the folder `logs`.

    Raises `ConfigError` for what the user can mend, `WorkerError` when a part dies or every episode fails.
    """
    with ungrouped():
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
        with WeightSync(learner.result(), engine.result(), tolerance=tolerance, canary_every=every) as sync:
            yield _Bench(job, suite, renderer, engine.result(), learner.result(), sync, own)


async def _start_environments(suite: EnvSuite, resources: Resources) -> None:
    """Begin one episode of each, which starts the parts that episodes share."""
    for env_id in suite.env_ids:
        env = suite.make(env_id, resources=resources)
        try:
            await env.areset(seed=0, options={"task": env.make_task("train", 0)})
        finally:
            await env.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Played:
    """Whose episodes are looked at, what they were made of, and their tokens."""

    is_model: bool
    work: tuple[EpisodeWork, ...]
    trajectories: tuple[Trajectory, ...]
    notes: tuple[str, ...]


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
        self._busy_sync_s: list[float] = []
        policy = EnginePolicy(engine, renderer, job.train.sampling)
        config = job.train
        self._player = Player(suite, policy, resources, group_size=config.group_size, seed=config.seed)

    async def run(self, seconds: float, bar: Bar) -> Measurements:
        """All phases."""
        await self._sync.publish(self._learner.version)
        bar.move_to(0.0, "episodes")
        played = await self._play(_PLAY * seconds)
        self._canaries = [t.ids.tolist() for t in played.trajectories[:_NUM_CANARIES]]
        bench = LearnerBench(self._learner, played.trajectories, self._config.learner)
        bar.move_to(_PLAY * seconds, "engine")
        levels, engine_alone = await self._measure_engine(played, bench, _ENGINE * seconds)
        bar.move_to((_PLAY + _ENGINE) * seconds, "learner")
        async with self._watch.during() as learner_alone:
            speed = await bench.measure(_LEARNER * seconds)
        await self._publish(bench)
        bar.move_to((1.0 - _ALONE - _TOGETHER) * seconds, "rollouts alone")
        slots = min(self._config.concurrency, setting_of(self._config).most_slots)
        _, alone = await self._player.play(self._watch, slots=slots, seconds=_ALONE * seconds)
        bar.move_to((1.0 - _TOGETHER) * seconds, "rollouts and learning together")
        together, learner_slowdown = await self._together(bench, speed, slots, _TOGETHER * seconds)
        bar.move_to(seconds)
        cores = {
            "engine alone": engine_alone.cores,
            "learner alone": learner_alone.cores,
            "rollouts alone": alone.cores,
            "together": together.cores,
        }
        measured = Measurements(
            player="model" if played.is_model else "expert",
            episodes=played.work,
            engine=levels,
            learner=speed.levels,
            learner_update_s=speed.update_s,
            sync_s=median(self._idle_sync_s),
            busy_sync_s=median(self._busy_sync_s or self._idle_sync_s),
            engine_slowdown=max(1.0, alone.tokens_per_s / max(together.tokens_per_s, 1e-9)) if alone.tokens else 1.0,
            learner_slowdown=learner_slowdown,
            num_cores=len(os.sched_getaffinity(0)),
            gpu_memory=_gpu_memory(self._config),
            cores=cores,
            notes=(*played.notes, *speed.notes, *_noise(cores)),
        )
        return _calibrated(measured, alone, slots)

    async def _publish(self, bench: LearnerBench) -> float:
        """Hand new weights to the engine, as after a step, which also empties its prefix cache; seconds without step.

        The weights are new in number alone: see `LearnerBench`.
        """
        await self._sync.prepare(self._canaries)
        await bench.step(1)
        started_s = time.monotonic()
        await self._sync.publish(self._learner.version)
        return time.monotonic() - started_s

    async def _play(self, seconds: float) -> _Played:
        """Episodes of the model, few at a time; the expert's where fewer than two ended."""
        slots = min(_FEW_SLOTS, self._config.concurrency)
        episodes, _ = await self._player.play(self._watch, slots=slots, seconds=seconds)
        usable = [e for e in episodes if e.trajectory is not None and e.turns and e.failure is None]
        if episodes and not usable:
            failure = next((e.failure for e in episodes if e.failure is not None), None)
            reason = f"{failure.kind}: {failure.message}" if failure is not None else "no turn was taken"
            raise WorkerError(f"none of {len(episodes)} episodes can be measured; the first: {reason}")
        if len(usable) < _ENOUGH_EPISODES:
            return await self._play_expert(seconds)
        trajectories = tuple(e.trajectory for e in usable if e.trajectory is not None)
        work = tuple(_work_of(e, t) for e, t in zip(usable, trajectories, strict=True))
        return _Played(is_model=True, work=work, trajectories=trajectories, notes=tuple(_doubts(usable)))

    async def _play_expert(self, seconds: float) -> _Played:
        episodes: dict[str, Episode] = {}
        try:
            demonstrations = await collect(
                self._suite,
                _NUM_EXPERT_EPISODES,
                skill=1.0,
                seed=self._config.seed,
                resources=self._resources,
                on_episode=lambda episode: episodes.update({episode.task.id: episode}),
            )
        except TaskError as error:
            raise ConfigError(
                f"fewer than {_ENOUGH_EPISODES} episodes of the model ended within {seconds:.0f} s, and no expert can "
                f"play instead ({error}); give more time with --seconds"
            ) from error
        trajectories = tuple(tokenize(demonstrations, self._renderer))
        played = [episodes[demonstration.task_id] for demonstration in demonstrations]
        work = tuple(_work_of(e, t) for e, t in zip(played, trajectories, strict=True))
        note = (
            f"fewer than {_ENOUGH_EPISODES} episodes of the model ended within {seconds:.0f} s: lengths are those of "
            "the scripted expert; give more time with --seconds"
        )
        return _Played(is_model=False, work=work, trajectories=trajectories, notes=(note,))

    async def _measure_engine(
        self, played: _Played, bench: LearnerBench, seconds: float
    ) -> tuple[tuple[EngineLevel, ...], Watched]:
        """Tokens per second at rising concurrencies, the better of two rounds; what was watched at the last."""
        prompts = [prompt for trajectory in played.trajectories for prompt in prompts_of(trajectory)]
        counts = level_counts(self._config.engine_config.max_num_seqs)
        best: dict[int, float] = {}
        for count in counts * _NUM_ROUNDS:
            self._idle_sync_s.append(await self._publish(bench))
            watched = await send_requests(
                self._engine,
                prompts,
                self._config.sampling,
                self._renderer.stop_ids,
                self._watch,
                slots=count,
                seconds=seconds / len(counts) / _NUM_ROUNDS,
            )
            if watched.tokens:
                best[count] = max(watched.tokens_per_s, best.get(count, 0.0))
        if not best:
            raise ConfigError(f"the engine sampled no token in {seconds:.0f} s: give more time with --seconds")
        return tuple(EngineLevel(concurrency=count, tokens_per_s=best[count]) for count in sorted(best)), watched

    async def _together(
        self, bench: LearnerBench, speed: LearnerSpeed, slots: int, seconds: float
    ) -> tuple[Watched, float]:
        """Rollouts while the learner steps: what was watched, and how much slower the steps were than alone."""
        level = next(
            (each for each in reversed(speed.levels) if each.tokens * each.token_s < seconds / 4), speed.levels[0]
        )
        num_rows = bench.num_rows(level.tokens)
        alone_s = speed.update_s + level.tokens * level.token_s
        taken_s: list[float] = []

        async def keep_learning() -> None:
            taken_s.append(await bench.step(num_rows))
            self._busy_sync_s.append(await self._publish(bench))
            while True:
                taken_s.append(await bench.step(num_rows))

        async with asyncio.TaskGroup() as tasks:
            learning = tasks.create_task(keep_learning())
            _, watched = await self._player.play(self._watch, slots=slots, seconds=seconds)
            learning.cancel()
        return watched, max(1.0, median(taken_s) / alone_s) if taken_s else 1.0


def level_counts(most: int) -> list[int]:
    """Concurrencies to measure: 1, 4, 16 and so on, and `most`."""
    counts = [_LEVEL_FACTOR**power for power in range(16) if _LEVEL_FACTOR**power < most]
    return [*counts, most]


def _gpu_memory(config: GRPOConfig) -> GpuMemory | None:
    """Memory of a GPU that vLLM and the learner share; None where they do not."""
    is_shared = config.engine == "vllm" and "cpu" not in (config.engine_config.device, config.learner.device)
    if not is_shared or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(total_mb=total / _MIB, free_mb=free / _MIB)


def _calibrated(measured: Measurements, rollouts: Watched, slots: int) -> Measurements:
    """With the driver's share of a turn, and how much slower rollouts were than the model of them says."""
    num_turns = rollouts.tokens / measured.tokens_per_turn
    if num_turns < 1:
        return measured
    measured = replace(measured, driver_s=rollouts.driver_s / num_turns)
    expected = float(episode_flow(measured, slots)[-1]) * measured.tokens_per_turn
    return replace(measured, overhead=max(1.0, expected / rollouts.tokens_per_s))


def _work_of(episode: Episode, trajectory: Trajectory) -> EpisodeWork:
    return EpisodeWork(
        num_turns=len(episode.turns),
        num_sampled=trajectory.num_sampled,
        num_inputs=inputs_of(trajectory),
        env_s=episode.timings.get("env_s", math.fsum(turn.env_s for turn in episode.turns)),
    )


def _doubts(episodes: Sequence[Episode]) -> list[str]:
    """What makes the model's episodes a weak basis."""
    doubts = []
    if len(episodes) < _FEW_EPISODES:
        doubts.append(f"only {len(episodes)} episodes ended in time: lengths are rough; give more time with --seconds")
    if not any(turn.num_calls > turn.num_invalid_calls for episode in episodes for turn in episode.turns):
        doubts.append(
            "the model made no valid call, so its episodes do not use the environments; once it learns to, turns and "
            "environment time grow: measure again then"
        )
    return doubts


def _noise(cores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A warning when somebody else used the machine."""
    others = max(used["others"] for used in cores.values())
    if others <= _QUIET_CORES:
        return []
    return [f"other work used up to {others:.1f} cores: the prediction is for a machine as busy as this one was"]
