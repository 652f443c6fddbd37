"""`Trainer`: opens the parts of a run, fits a suite, and leaves a run folder that explains itself.

Invariant: whatever happens, every process and temporary folder is gone when `fit` returns or raises, and the
run folder can be fitted again to go on from the last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from palaestra.agents import Engine, EnginePolicy, ModelPolicy
from palaestra.agents.engines import open_engine
from palaestra.agents.renderers import family_of, mark_family, open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import FULL, ConfigError, refuse_inside_a_loop, ungrouped
from palaestra.records import write_whole
from palaestra.resources import Resources
from palaestra.trainer._interrupts import interrupts
from palaestra.trainer._model_identity import identity_beside, identity_of, place_of
from palaestra.trainer._take_over import settle_model, take_over
from palaestra.trainer.buffer import ReplayBuffer
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.fit import Fit, OnStep, Parts
from palaestra.trainer.learner import Learner, LearnerConfig, LocalLearner
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.metrics import one_line
from palaestra.trainer.resume import resume
from palaestra.trainer.rollouts import RolloutPlan, RolloutWorkers, most_groups_in_hand
from palaestra.trainer.rows import is_trainable, objection_to
from palaestra.trainer.run_rules import as_recorded, check_allowed
from palaestra.trainer.sampler import TaskSampler
from palaestra.trainer.stalls import ProcessPart, Stalls
from palaestra.trainer.sync import WeightSync

BEFORE_FIRST_WEIGHTS = -1
_SHOWN_EPISODES = 5

OnReady = Callable[[int], Awaitable[None]]
"""Hears the version of the weights that the engine holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How a fit ended: the last version, whether it reached `steps`, and the exported model folder.

    `steps` are the records of all updates, as JSON objects; `palaestra.trainer.ledger.read_records` has the episodes.
    """

    version: int
    is_complete: bool
    model: Path
    steps: list[dict[str, Any]]


class Trainer:
    """Trains one model by GRPO on environment suites.

    `model` is a Hugging Face model folder (or id, where the hub can be reached). `run` is the run folder, a
    new one under `runs/` by default; an existing one is resumed, by the rules of `palaestra.trainer.run_rules`, where
    `allow` names the declared changes (`suite`) that are wanted. `on_note` hears of what is not plain, a line each.
    """

    def __init__(
        self,
        model: str | Path,
        config: GRPOConfig | None = None,
        *,
        run: Path | str | None = None,
        on_step: OnStep | None = None,
        on_note: Callable[[str], None] | None = None,
        allow: Collection[str] = (),
    ) -> None:
        self.model = str(model)
        self.config = config or GRPOConfig()
        self.run = Path(run) if run is not None else Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        self._on_step = on_step or (lambda record: print(one_line(record), flush=True))
        self._say = on_note or (lambda line: print(line, file=sys.stderr, flush=True))
        check_allowed(allow)
        self._allow = frozenset(allow)

    def fit(self, suite: EnvSuite) -> FitResult:
        """`afit`, run to its end. Ctrl-C once finishes the step under way, saves and leaves; twice just leaves.

        Raises `ConfigError` inside a running event loop.
        """
        refuse_inside_a_loop("fit()", "afit()")
        return asyncio.run(self.afit(suite))

    async def afit(
        self,
        suite: EnvSuite,
        *,
        engine: Engine | None = None,
        resources: Resources | None = None,
        on_ready: OnReady | None = None,
    ) -> FitResult:
        """Train on the suite's train split. A given engine or resources stay open for their owner.

        `on_ready` is awaited once the engine holds the learner's weights, before the first update.
        Raises `ConfigError` for what the user can mend and `WorkerError` when a component dies.
        """
        with ungrouped():
            return await self._afit(suite, engine, resources, on_ready)

    async def _afit(
        self, suite: EnvSuite, engine: Engine | None, resources: Resources | None, on_ready: OnReady | None
    ) -> FitResult:
        with interrupts() as asked:
            async with self._parts(suite, engine, resources) as parts:
                if on_ready is not None:
                    await on_ready(parts.learner.version)
                fit = Fit(parts, on_step=self._on_step)
                with asked.finishing(fit.stop):
                    await fit.train()
                async with parts.stalls.wait("the run waits for the learner to export the model"):
                    await parts.learner.export(self.model_folder)
                mark_family(self.model_folder, family_of(self.model, self.config.family))
                return FitResult(
                    version=parts.learner.version,
                    is_complete=parts.learner.version >= self.config.steps,
                    model=self.model_folder,
                    steps=await parts.ledger.steps(),
                )

    @property
    def model_folder(self) -> Path:
        """Where the trained model is exported to."""
        return self.run / "model"

    @property
    def policy(self) -> ModelPolicy:
        """The trained model as a policy; raises `ConfigError` before the first fit."""
        if not (self.model_folder / "config.json").is_file():
            raise ConfigError(f"{self.run} holds no trained model yet: call fit() first")
        return ModelPolicy(
            self.model_folder,
            family=self.config.family,
            engine=self.config.engine,
            sampling=self.config.sampling,
            engine_config=self.config.engine_config,
            log_path=self.run / "logs" / "policy.log",
            name="trained policy",
        )

    @asynccontextmanager
    async def _parts(self, suite: EnvSuite, engine: Engine | None, resources: Resources | None) -> AsyncIterator[Parts]:
        config = self.config
        async with Resources() as own:
            # a model that cannot be talked to is refused before anything is written or started
            renderer = open_renderer(self.model, family=config.family)
            meta = as_recorded({"model": identity_of(self.model), "suite": suite.describe(), "seed": config.seed})
            stalls = self._stalls()
            async with stalls.watching():
                ledger = await self._open_ledger(own, meta, stalls)
                self._write_config(suite)
                checkpoints = await own.get("checkpoints", partial(self._checkpoints, ledger))
                learner, engine = await self._open_models(own, ledger, checkpoints, engine, stalls)
                async with stalls.wait("the run waits for the ledger to take its configuration"):
                    await ledger.use_config(config.model_dump(mode="json"))
                    next_number = await ledger.next_number()
            stalls.processes = [part for part in (learner, engine) if isinstance(part, ProcessPart)]
            async with stalls.watching():
                policy = EnginePolicy(engine, renderer, config.sampling)
                buffer = ReplayBuffer(max_lag=config.max_lag, objection=partial(objection_to, config=config))
                sampler = TaskSampler(suite.split("train"), seed=config.seed, next_number=next_number)
                rollouts = RolloutWorkers(
                    suite.split("train"), policy, sampler, ledger, resources or own, self._plan(), on_group=buffer.put
                )
                stalls.facts = partial(self._facts, learner, buffer, rollouts)
                async with WeightSync(
                    learner, engine, tolerance=config.canary_tolerance, canary_every=config.canary_every
                ) as sync:
                    async with stalls.wait("the run waits for the engine to take the first weights"):
                        await sync.publish(learner.version)
                    yield Parts(
                        config=config,
                        learner=learner,
                        engine=engine,
                        sync=sync,
                        ledger=ledger,
                        buffer=buffer,
                        rollouts=rollouts,
                        checkpoints=checkpoints,
                        stalls=stalls,
                    )

    async def _open_ledger(self, own: Resources, meta: Mapping[str, Any], stalls: Stalls) -> Ledger:
        async with stalls.wait("the run waits for its ledger to be checked"):
            ledger = await own.get("ledger", partial(Ledger.open, self.run, meta=meta, tell=stalls.tell))
        async with stalls.wait("the run waits for the ledger to be taken over"):
            meta = {**meta, "model": identity_beside((await ledger.meta())["model"], self.model)}
            await take_over(ledger, meta, self.config, allow=self._allow, say=partial(self._tell, ledger, stalls))
        return ledger

    async def _checkpoints(self, ledger: Ledger) -> Checkpoints:
        run = (await ledger.meta())["run"]
        return await Checkpoints.open(self.run / "checkpoints", run=run, kept=self.config.num_checkpoints)

    async def _tell(self, ledger: Ledger, stalls: Stalls, line: str) -> None:
        await ledger.note(line)
        stalls.tell(line)

    def _stalls(self) -> Stalls:
        return Stalls(
            folder=self.run / "logs",
            report_s=self.config.stall_report_s,
            processes=(),
            say=self._say,
        )

    def _facts(self, learner: Learner, buffer: ReplayBuffer, rollouts: RolloutWorkers) -> list[str]:
        return [
            f"the learner holds version {learner.version}",
            f"{len(buffer)} of {self.config.groups_per_step} groups are ready",
            f"{rollouts.num_generating} episodes are running",
            *rollouts.describe()[:_SHOWN_EPISODES],
        ]

    async def _open_learner(self, config: LearnerConfig) -> Learner:
        return await LocalLearner.start(self.model, config, log_path=self.run / "logs" / "learner.log")

    async def _open_models(
        self, own: Resources, ledger: Ledger, checkpoints: Checkpoints, engine: Engine | None, stalls: Stalls
    ) -> tuple[Learner, Engine]:
        config = self.config
        seats: dict[str, Learner | Engine] = {}

        def seat(name: str, part: Learner | Engine) -> None:
            seats[name] = part
            stalls.processes = [each for each in seats.values() if isinstance(each, ProcessPart)]

        async def open_learner(settings: LearnerConfig) -> Learner:
            async with AsyncExitStack() as unsettled:
                async with stalls.wait("the run waits for the learner to start"):
                    learner = await self._open_learner(settings)
                unsettled.push_async_callback(learner.aclose)
                await settle_model(ledger, self.model)
                unsettled.pop_all()
            seat("learner", learner)
            return learner

        async def start_engine() -> Engine:
            log, settings = self.run / "logs" / "engine.log", config.engine_settings
            async with stalls.wait("the run waits for the engine to start", facts=lambda: [f"its log is {log}"]):
                started = await open_engine(config.engine, self.model, settings, log, version=BEFORE_FIRST_WEIGHTS)
            seat("engine", started)
            return started

        start_learner = partial(
            resume,
            ledger,
            checkpoints,
            config.learner,
            save_every=config.save_every,
            open_learner=open_learner,
            say=partial(self._tell, ledger, stalls),
        )
        if engine is not None:
            seat("engine", engine)
        if await ledger.last_step():  # what is made again wants the memory, and fails before a minute of engine
            async with stalls.wait("the run waits to be at its last step again"):
                await own.get("learner", start_learner)
        async with asyncio.TaskGroup() as tasks:
            learner = tasks.create_task(own.get("learner", start_learner))
            if engine is None:
                started = tasks.create_task(own.get("engine", start_engine))
        return learner.result(), engine if engine is not None else started.result()

    def _plan(self) -> RolloutPlan:
        config = self.config
        return RolloutPlan(
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

    def _write_config(self, suite: EnvSuite) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            resolved = {
                "model": place_of(self.model),
                "suite": suite.describe(),
                "train": self.config.model_dump(mode="json"),
            }
            write_whole(self.run / "config.json", json.dumps(resolved, indent=2) + "\n")
        except OSError as error:
            if error.errno in FULL:
                raise
            raise ConfigError(
                f"cannot write the run folder {self.run}: {error.strerror}; choose another place"
            ) from error
