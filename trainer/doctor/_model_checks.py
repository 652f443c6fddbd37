"""The checks of the model: it can be talked to, is served and trained, both sides agree, its groups differ."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from palaestra.agents import Engine, Renderer
from palaestra.agents.engines import open_engine
from palaestra.agents.renderers import open_renderer
from palaestra.resources import Resources
from palaestra.trainer.demonstrations import Demonstration, texts_of
from palaestra.trainer.doctor._agreement import check_agreement, conversations
from palaestra.trainer.doctor._check import Finding, ok
from palaestra.trainer.doctor._conversations import Transcript, check_calls, judge_template, transcribe
from palaestra.trainer.doctor._env_worker import FarModel, Played
from palaestra.trainer.doctor._far_engine import served
from palaestra.trainer.doctor._guard import MissingError, Part, Sheet
from palaestra.trainer.doctor._memory_plan import Rows
from palaestra.trainer.doctor._model_size import find_model
from palaestra.trainer.doctor._probe import EnvProbe
from palaestra.trainer.doctor._subject import NewModel, Subject
from palaestra.trainer.doctor._variance import SampledGroups, judge_variance
from palaestra.trainer.learner import Learner, LocalLearner
from palaestra.trainer.tiny import make_model, make_tokenizer
from palaestra.types import Trajectory

ROWS = ("model", "engine", "learner", "template", "tool calls", "variance", "agreement")

_MODEL_S, _JUDGE_S, _SCORE_S, _GROUPS_S = 120.0, 60.0, 60.0, 40.0
_GRACE_S, _PLAYER_S = 10.0, 60.0
"""What engine and learner get beyond their own deadlines, and the process in which groups are played for its start."""


class ModelChecks:
    """Engine and learner start at once; what they agree on is checked when both are there."""

    def __init__(
        self,
        subject: Subject,
        sheet: Sheet,
        folder: Path,
        resources: Resources,
        talks: Part[dict[str, Played]],
        player: EnvProbe,
    ) -> None:
        self.model: Part[str] = Part("the model")
        self._subject = subject
        self._train = subject.train
        self._sheet = sheet
        self._folder = folder
        self._resources = resources
        self._talks = talks
        self._player = player
        self._renderer: Part[Renderer] = Part("the model's chat format")
        self._engine: Part[Engine] = Part("the engine")
        self._learner: Part[Learner] = Part("the learner")
        self._groups: Part[SampledGroups] = Part("sampled groups")
        self._transcripts: list[Transcript] = []

    async def run(self) -> None:
        """All rows of the model."""
        if isinstance(self._subject.model, NewModel):
            await self._talks.get_or_none()
        await self._sheet.row("model", _MODEL_S, self._open_model)
        for part in (self.model, self._renderer):
            part.give_up()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._check_sides())
            tasks.create_task(self._check_words())

    async def _check_words(self) -> None:
        await self._talks.get_or_none()
        await self._sheet.row("template", _JUDGE_S, self._check_template)
        await self._sheet.row("tool calls", _JUDGE_S, self._check_calls)

    async def _check_sides(self) -> None:
        engine_s = self._train.engine_config.start_timeout_s + _GRACE_S
        learner_s = self._train.learner.start_timeout_s + _GRACE_S
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sheet.row("engine", engine_s, self._start_engine))
            tasks.create_task(self._sheet.row("learner", learner_s, self._start_learner))
        for part in (self._engine, self._learner):
            part.give_up()
        await self._talks.get_or_none()  # not within the row's deadline
        await self._sheet.row("variance", _GROUPS_S + _PLAYER_S, self._check_variance)
        self._groups.give_up()
        await self._sheet.row("agreement", _SCORE_S, self._check_agreement)

    async def _open_model(self) -> Finding:
        given = self._subject.model
        if isinstance(given, NewModel):
            played = await self._talks.get()
            path = str(await asyncio.to_thread(_make_new_model, given, played, self._folder / "model"))
            detail = (
                f"made with random weights, tokenizer from {sum(len(p.episodes) for p in played.values())} episodes"
            )
        else:
            path = detail = await asyncio.to_thread(find_model, given)
        self.model.settle(path)
        renderer = await asyncio.to_thread(open_renderer, path, family=self._train.family)
        self._renderer.settle(renderer)
        return ok(f"{detail}; replies end with {len(renderer.stop_ids)} stop tokens")

    async def _start_engine(self) -> Finding:
        path = await self.model.get()
        log_path = self._folder / "engine.log"
        start = partial(open_engine, self._train.engine, path, self._train.engine_config, log_path)
        engine = await self._resources.get("engine", start)
        self._engine.settle(engine)
        return ok(f"{self._train.engine} serves contexts of {engine.max_model_len} tokens")

    async def _start_learner(self) -> Finding:
        path = await self.model.get()
        start = partial(LocalLearner.start, path, self._train.learner, self._folder / "learner.log")
        self._learner.settle(await self._resources.get("learner", start))
        return ok("the model is loaded for training")

    async def _check_template(self) -> Finding:
        renderer, played = await self._renderer.get(), await self._talks.get()
        context = await asyncio.to_thread(lambda: self._subject.context)
        self._transcripts = await asyncio.to_thread(transcribe, played, renderer)
        return judge_template(self._transcripts, renderer, context)

    async def _check_calls(self) -> Finding:
        renderer, played = await self._renderer.get(), await self._talks.get()
        return await asyncio.to_thread(check_calls, played, renderer)

    async def _check_variance(self) -> Finding:
        engine, _ = await self._engine.get(), await self._renderer.get()
        played = await self._talks.get_or_none() or {}
        for env_id in self._subject.suite.env_ids:
            if env_id not in played:
                raise MissingError(f"needs environment {env_id}, which could not be played")
        async with served(engine, self._folder) as socket:
            model = FarModel(await self.model.get(), socket, engine.max_model_len)
            groups = await self._player.sample_groups(model, self._train, _GROUPS_S)
        self._groups.settle(groups)
        return judge_variance(groups, self._train, is_new=isinstance(self._subject.model, NewModel))

    async def _check_agreement(self) -> Finding:
        engine, learner = await self._engine.get(), await self._learner.get()
        played, renderer = await self._talks.get_or_none(), await self._renderer.get()
        texts = conversations(played or {}, renderer, engine.max_model_len)
        return await check_agreement(engine, learner, texts, await self._sampled(), self._train)

    async def rows(self) -> Rows:
        """How long conversations are, when all rows are there."""
        context = await asyncio.to_thread(lambda: self._subject.context)
        longest = max((len(each.ids) for each in self._transcripts), default=0)
        return Rows.of(await self._sampled(), longest, context)

    async def _sampled(self) -> list[Trajectory]:
        groups = await self._groups.get_or_none()
        sampled = [episode.trajectory for episode in groups.all()] if groups is not None else []
        return [trajectory for trajectory in sampled if trajectory is not None]


def _make_new_model(new: NewModel, played: Mapping[str, Played], folder: Path) -> Path:
    """A model as the main job would make it, from what experts said; blocks for the seconds in which torch loads."""
    demonstrations = [
        Demonstration(task_id=e.task.id, messages=e.messages, tools=each.tools, is_success=e.is_success)
        for each in played.values()
        for e in each.episodes
    ]
    make_tokenizer(texts_of(demonstrations), folder, vocab_size=new.vocab_size)
    return make_model(folder, new.size, seed=new.seed)
