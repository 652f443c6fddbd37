"""Held-out success of the checkpoints that a run left, played after it, with tools that answer at once.

Invariant: every checkpoint plays the same tasks with the same seeds on one engine; a judgement that is kept is not made
again, whatever was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._lag.desk import is_long_task, is_slow_task
from benchmarks._lag.plan import NUM_HELD_OUT, NUM_STRAGGLER_TASKS, STRAGGLER_SAMPLES, Run, suite_at_rest
from benchmarks._lag.play import SharedEngine

from palaestra.agents import EnginePolicy, Sampling, aevaluate
from palaestra.agents.renderers import open_renderer
from palaestra.records import write_whole
from palaestra.resources import Resources
from palaestra.trainer.learner import LearnerConfig, LocalLearner
from palaestra.trainer.sync import WeightSync
from palaestra.types import Episode, Task

_CONCURRENCY = 128
_TOLERANCE = 0.05


class Judge:
    """Puts checkpoints into the engine, one after another, and lets them play."""

    def __init__(self, start: Path, engine: SharedEngine, resources: Resources) -> None:
        self._start = start
        self._engine = engine
        self._resources = resources

    async def judge_start(self, folder: Path) -> None:
        """The policy that all runs began with, on both sets of tasks."""
        await self._judge_all(folder, [(0, None)])
        await self._judge_all(folder, [(0, None)], of_stragglers=True)

    async def judge(self, run: Run, folder: Path) -> None:
        """All checkpoints of a run; of one with slow tasks the last, on more tasks."""
        found = sorted((folder / "checkpoints").glob("version-????????"))
        checkpoints = [(int(path.name.partition("-")[2]), path) for path in found]
        chosen = checkpoints[-1:] if run.is_of_stragglers else checkpoints
        await self._judge_all(folder, chosen, of_stragglers=run.is_of_stragglers)

    async def hold_middle(self, folder: Path) -> None:
        """Put the policy of the middle of a run into the engine."""
        checkpoints = sorted((folder / "checkpoints").glob("version-????????"))
        async with await self._open_learner(folder) as learner:
            await self._hold(learner, checkpoints[(len(checkpoints) - 1) // 2])

    async def _judge_all(
        self, folder: Path, checkpoints: Sequence[tuple[int, Path | None]], *, of_stragglers: bool = False
    ) -> None:
        kept = folder / ("judged-stragglers.json" if of_stragglers else "judged.json")
        if kept.is_file():
            return
        judged = {}
        async with await self._open_learner(folder) as learner:
            for update, checkpoint in checkpoints:
                await self._hold(learner, checkpoint)
                judged[update] = await self._play(of_stragglers=of_stragglers)
        write_whole(kept, json.dumps(judged) + "\n")

    async def _open_learner(self, folder: Path) -> LocalLearner:
        return await LocalLearner.start(self._start, LearnerConfig(), log_path=folder / "logs" / "judge.log")

    async def _hold(self, learner: LocalLearner, checkpoint: Path | None) -> None:
        """Put a checkpoint, by default the start policy, into the engine."""
        if checkpoint is not None:
            await learner.load(checkpoint)
        await self._engine.begin()
        async with WeightSync(learner, self._engine, tolerance=_TOLERANCE, canary_every=1) as sync:
            await sync.publish(learner.version)

    async def _play(self, *, of_stragglers: bool) -> list[dict[str, Any]]:
        policy = EnginePolicy(self._engine, open_renderer(self._start), Sampling(max_tokens=32))
        report = await aevaluate(
            policy,
            suite_at_rest(),
            tasks=NUM_STRAGGLER_TASKS if of_stragglers else NUM_HELD_OUT,
            samples=STRAGGLER_SAMPLES if of_stragglers else 1,
            concurrency=_CONCURRENCY,
            resources=self._resources,
        )
        return [_verdict(episode) for episode in report.episodes if episode.failure is None]


def _verdict(episode: Episode) -> dict[str, Any]:
    return {"task": episode.task.seed, "kind": kind_of(episode.task), "solved": int(episode.is_success)}


def kind_of(task: Task) -> str:
    """`short`, `long` or `slow`; slow tasks are long ones whose tools are slow."""
    if is_slow_task(task):
        return "slow"
    return "long" if is_long_task(task) else "short"
