"""The main job, stage by stage: demonstrations, model, imitation, reinforcement learning, evaluation, report.

Invariant: every stage can be interrupted and begun again; what is done is not done twice, and the run folder at
the end holds everything that the report says.
"""

from __future__ import annotations

import asyncio
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from palaestra.agents import Engine, EnginePolicy, EvalReport, ExpertPolicy, Policy, RandomPolicy, aevaluate
from palaestra.agents.engines import open_engine
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import ungrouped
from palaestra.records import write_records
from palaestra.resources import Resources
from palaestra.trainer._model_identity import place_of
from palaestra.trainer.ledger import read_records
from palaestra.trainer.metrics import StepRecord, one_line
from palaestra.trainer.progress import Display
from palaestra.trainer.quickstart._config import QuickstartConfig
from palaestra.trainer.quickstart._facts import describe_machine, headline
from palaestra.trainer.quickstart._folder import RunFolder
from palaestra.trainer.quickstart._preflight import check_parts
from palaestra.trainer.quickstart._warm_up import Corpus, gather_corpus, imitate, make_base
from palaestra.trainer.report import write_report
from palaestra.trainer.trainer import BEFORE_FIRST_WEIGHTS, FitResult, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartResult:
    """Where the run is, the held-out evaluations by policy, and whether every stage was finished."""

    run: Path
    report: Path | None
    evaluations: dict[str, EvalReport]
    is_complete: bool


async def run_quickstart(config: QuickstartConfig, run: Path, display: Display) -> QuickstartResult:
    """Run the job, or go on with one that was interrupted.

    Raises `ConfigError` for what the user can mend and `WorkerError` when a component dies.
    """
    if config.model is not None:  # kept so that it is found from any folder
        config = config.model_copy(update={"model": place_of(config.model)})
    folder = RunFolder(run)
    folder.prepare(config.model_dump(mode="json"))
    with ungrouped():
        async with Resources() as resources:
            return await _Job(config, folder, display, resources).run()


class _Job:
    def __init__(self, config: QuickstartConfig, folder: RunFolder, display: Display, resources: Resources) -> None:
        self._config = config
        self._folder = folder
        self._display = display
        self._resources = resources
        self._suite = EnvSuite(config.weights, form=config.form, options=config.options)
        self._evaluations: dict[str, EvalReport] = {}

    async def run(self) -> QuickstartResult:
        await asyncio.to_thread(check_parts, self._config, self._folder)
        corpus = await self._prepare()
        async with asyncio.TaskGroup() as tasks:
            engine = tasks.create_task(self._open_engine())
            tasks.create_task(self._judge_baselines())
            tasks.create_task(self._imitate(corpus))
        fitted = await self._reinforce(engine.result())
        if not fitted.is_complete:
            self._display.say(f"stopped at update {fitted.version}; the same command goes on from there")
            return QuickstartResult(
                run=self._folder.path, report=None, evaluations=self._evaluations, is_complete=False
            )
        await self._judge_rl(engine.result())
        return self._report(fitted)

    async def _prepare(self) -> Corpus | None:
        """The demonstrations and the base model; None when imitation is done and nobody needs them."""
        if self._folder.stage("imitation") is not None:
            return None
        corpus: Corpus | None = None
        with self._folder.record_stage("demonstrations") as note:
            corpus = await gather_corpus(self._config, self._suite, self._resources, self._display)
            note.text = corpus.describe()
        self._display.say(note.text)
        if self._folder.stage("model") is None:
            with self._folder.record_stage("model") as note:
                note.text = await asyncio.to_thread(make_base, self._config, self._folder, corpus)
            self._display.say(note.text)
        return corpus

    async def _open_engine(self) -> Engine:
        config = self._config.seeded_rl
        start = partial(
            open_engine,
            config.engine,
            self._folder.base,
            config.engine_settings,
            self._folder.logs / "engine.log",
            version=BEFORE_FIRST_WEIGHTS,
        )
        return await self._resources.get("engine", start)

    async def _judge_baselines(self) -> None:
        await self._judge("random", RandomPolicy())
        await self._judge("expert", ExpertPolicy())

    async def _imitate(self, corpus: Corpus | None) -> None:
        if corpus is None:
            return
        with self._folder.record_stage("imitation") as note:
            note.text = await imitate(self._config, self._folder, corpus, self._display)
        self._display.say(note.text)

    async def _reinforce(self, engine: Engine) -> FitResult:
        trainer = Trainer(self._folder.sft, self._config.seeded_rl, run=self._folder.rl, on_step=self._show_step)
        with self._folder.record_stage("reinforcement learning") as note:
            result = await trainer.afit(
                self._suite, engine=engine, resources=self._resources, on_ready=lambda version: self._judge_sft(engine)
            )
            mode = "asynchronous" if self._config.rl.max_lag else "synchronous"
            note.text = f"{result.version} policy updates by {mode} GRPO, lag at most {self._config.rl.max_lag}"
            note.seconds = math.fsum(step["wall_s"] for step in result.steps)
            note.is_done = result.is_complete
        if result.is_complete:
            self._keep_model(trainer.model_folder)
            write_records(self._folder.path / "episodes" / "train.jsonl", read_records(self._folder.rl))
        return result

    def _keep_model(self, source: Path) -> None:
        partial = self._folder.model.with_name("model.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        shutil.rmtree(self._folder.model, ignore_errors=True)
        partial.rename(self._folder.model)

    async def _judge_sft(self, engine: Engine) -> None:
        # the engine holds the SFT weights here, unless an earlier run of this job has judged them already
        await self._judge_both_ways("sft", "SFT", engine)

    def _show_step(self, record: StepRecord) -> None:
        self._display.say(one_line(record))

    async def _judge_rl(self, engine: Engine) -> None:
        await self._judge_both_ways("rl", "RL", engine)

    async def _judge_both_ways(self, key: str, name: str, engine: Engine) -> None:
        """As it was sampled in training, and greedily: what is left of a gain then is more than sharper sampling."""
        renderer = open_renderer(self._folder.base)
        sampled = self._config.rl.sampling
        greedy = sampled.model_copy(update={"temperature": 0.0})
        await self._judge(key, EnginePolicy(engine, renderer, sampled, name=name))
        await self._judge(f"{key}-greedy", EnginePolicy(engine, renderer, greedy, name=f"{name}, greedy"))

    async def _judge(self, key: str, policy: Policy) -> None:
        name = f"evaluation of {key}"
        if self._folder.stage(name) is not None:
            self._evaluations[key] = self._folder.load_evaluation(key, policy.name)
            return
        count = self._config.num_eval_tasks
        with self._folder.record_stage(name) as note, self._display.bar(name, count) as bar:
            report = await aevaluate(
                policy,
                self._suite.split("test"),
                tasks=count,
                concurrency=self._config.concurrency,
                seed=self._config.seed,
                resources=self._resources,
                on_episode=lambda episode: bar.advance(),
            )
            self._folder.keep_evaluation(key, report)
            note.text = headline(report)
        self._evaluations[key] = report
        self._display.say(note.text)

    def _report(self, fitted: FitResult) -> QuickstartResult:
        order = ("random", "sft", "rl", "sft-greedy", "rl-greedy", "expert")
        page = write_report(
            self._folder.path,
            title="Palaestra quickstart",
            stages=self._folder.stages(),
            evaluations=[self._evaluations[key] for key in order],
            steps=fitted.steps,
            facts=describe_machine(self._config),
            notes=_NOTES,
            shown=self._evaluations["rl"],
        )
        return QuickstartResult(run=self._folder.path, report=page, evaluations=self._evaluations, is_complete=True)


_NOTES = (
    "The SFT model imitates an expert that slips on purpose, so that reinforcement learning has something left to "
    "learn: a gain over it says that the trainer works, not that the tasks are hard.",
    "SFT and RL policies are sampled at temperature 1, as in training. Greedy decoding takes most slips back by "
    "itself: compare the greedy rows for what was learned beyond sharper sampling.",
    "The environments play in their compact form, whose tasks a small model can learn; of MiniWoB++ eleven pages, "
    "listed in config.json. The checks are those of the full form.",
)
