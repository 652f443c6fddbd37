"""Policies: what turns a conversation into the next assistant message.

Invariant of `EnginePolicy`: the tokens of an episode are one growing list. What the engine sampled is kept as
sampled, with its log-probabilities and versions; each new prompt starts with exactly the ids before it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from palaestra.agents._engine import Completion, Engine, Sampling
from palaestra.agents._renderer import Renderer
from palaestra.agents.engines import EngineConfig, open_engine
from palaestra.agents.renderers import open_renderer
from palaestra.envs import Env
from palaestra.errors import ContextFullError, PolicyError
from palaestra.types import Message, Observation, Task, ToolSpec, Trajectory


class Session(Protocol):
    """One policy in one episode."""

    async def act(self, observation: Observation) -> Message:
        """The next assistant message after the new messages; raises `ContextFullError` when none fits."""

    def trajectory(self) -> Trajectory | None:
        """The episode as tokens; None for policies without tokens."""


class Policy(Protocol):
    """Anything that can play. Enter it before asking for sessions; entering starts what it needs."""

    name: str

    def session(self, env: Env, task: Task, *, seed: int) -> Session:
        """A session for one episode of `env`; the same seed gives the same choices."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PolicyBase:
    """Entering and leaving for policies that own nothing."""

    async def __aenter__(self) -> PolicyBase:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class EnginePolicy(PolicyBase):
    """Plays with an engine that somebody else owns."""

    def __init__(self, engine: Engine, renderer: Renderer, sampling: Sampling, *, name: str = "policy") -> None:
        self.name = name
        self.engine = engine
        self.renderer = renderer
        self.sampling = sampling

    def session(self, env: Env, task: Task, *, seed: int) -> EngineSession:
        """A session whose turns are sampled with seeds derived from `seed`."""
        return EngineSession(self.engine, self.renderer, self.sampling, env.tools, seed)


class EngineSession:
    """The token record of one episode."""

    def __init__(
        self, engine: Engine, renderer: Renderer, sampling: Sampling, tools: Sequence[ToolSpec], seed: int
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._sampling = sampling
        self._tools = tuple(tools)
        self._seed = seed
        self._ids: list[int] = []
        self._spans: list[tuple[int, Completion]] = []

    async def act(self, observation: Observation) -> Message:
        """Sample one assistant message; its tokens join the record."""
        prompt = self._prompt(observation)
        room = self._engine.max_model_len - len(prompt)
        if room < 1:
            raise ContextFullError(f"{len(prompt)} tokens leave no room in a context of {self._engine.max_model_len}")
        sampling = self._sampling
        if room < sampling.max_tokens:
            sampling = sampling.model_copy(update={"max_tokens": room})
        turn_seed = (self._seed * 1_000_003 + len(self._spans)) % (1 << 31)
        completion = await self._engine.generate(prompt, sampling, stop_ids=self._renderer.stop_ids, seed=turn_seed)
        self._ids = prompt
        self._spans.append((len(prompt), completion))
        self._ids.extend(completion.ids.tolist())
        return self._renderer.parse(completion.ids.tolist(), self._tools)

    def trajectory(self) -> Trajectory | None:
        """The record as arrays; None when nothing was sampled."""
        if not self._spans:
            return None
        num_tokens = len(self._ids)
        loss_mask = np.zeros(num_tokens, np.bool_)
        logprobs = np.zeros(num_tokens, np.float32)
        versions = np.full(num_tokens, -1, np.int32)
        turns = np.full(num_tokens, -1, np.int16)
        for turn, (start, completion) in enumerate(self._spans):
            span = slice(start, start + len(completion.ids))
            loss_mask[span] = True
            logprobs[span] = completion.logprobs
            versions[span] = completion.versions
            turns[start:] = turn
        ids = np.asarray(self._ids, np.int32)
        return Trajectory(ids=ids, loss_mask=loss_mask, logprobs=logprobs, versions=versions, turns=turns)

    def _prompt(self, observation: Observation) -> list[int]:
        if not self._spans:
            return self._renderer.start(observation, self._tools)
        prompt = self._renderer.extend(self._ids, observation)
        if prompt[: len(self._ids)] != self._ids:
            raise PolicyError("the renderer changed history; only append-only renderers can be trained on")
        return prompt


class ExpertPolicy(PolicyBase):
    """Plays each environment's scripted expert, with slips when `skill` is below 1.

    At each decision it takes the best message with probability `skill`, else one of the expert's slips.
    """

    def __init__(self, *, skill: float = 1.0) -> None:
        if not 0.0 <= skill <= 1.0:
            raise ValueError(f"skill must be in [0, 1], not {skill}")
        self.name = "expert" if skill == 1.0 else f"expert (skill {skill:g})"
        self.skill = skill

    def session(self, env: Env, task: Task, *, seed: int) -> _ExpertSession:
        """A session; raises `TaskError` where the environment ships no expert."""
        return _ExpertSession(env, task, self.skill, seed)


class _ExpertSession:
    def __init__(self, env: Env, task: Task, skill: float, seed: int) -> None:
        self._expert = env.expert()
        self._task = task
        self._skill = skill
        self._rng = np.random.default_rng([seed, 1])
        self._conversation: list[Message] = []

    async def act(self, observation: Observation) -> Message:
        self._conversation.extend(observation)
        decision = self._expert.decide(self._task, self._conversation)
        message = decision.best
        if decision.slips and self._rng.random() >= self._skill:
            message = decision.slips[int(self._rng.integers(len(decision.slips)))]
        self._conversation.append(message)
        return message

    def trajectory(self) -> None:
        return None


class RandomPolicy(PolicyBase):
    """Samples the environment's action space: calls that parse, with arguments at random."""

    name = "random"

    def session(self, env: Env, task: Task, *, seed: int) -> _RandomSession:
        """A session that seeds the environment's action space."""
        return _RandomSession(env, seed)


class _RandomSession:
    def __init__(self, env: Env, seed: int) -> None:
        self._space = env.action_space
        self._space.seed(seed)

    async def act(self, observation: Observation) -> Message:
        return self._space.sample()

    def trajectory(self) -> None:
        return None


class ModelPolicy:
    """A model folder that plays with an engine of its own, started on entering and stopped on leaving.

    `family` is its chat family, such as `qwen3`, where neither its name nor its folder tells.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        family: str | None = None,
        engine: str = "vllm",
        sampling: Sampling | None = None,
        engine_config: EngineConfig | None = None,
        log_path: Path | None = None,
        name: str | None = None,
    ) -> None:
        self.model = str(model)
        self.name = name or Path(self.model).name
        self._family = family
        self._engine_name = engine
        self._engine_config = engine_config or EngineConfig()
        self._sampling = sampling or Sampling()
        self._log_path = log_path
        self._live: EnginePolicy | None = None

    def session(self, env: Env, task: Task, *, seed: int) -> EngineSession:
        """A session; raises `PolicyError` before the policy was entered."""
        if self._live is None:
            raise PolicyError("enter the policy first: `async with policy:`")
        return self._live.session(env, task, seed=seed)

    async def __aenter__(self) -> ModelPolicy:
        renderer = open_renderer(self.model, family=self._family)
        log_path = self._log_path or Path(tempfile.gettempdir()) / f"palaestra-engine-{os.getpid()}.log"
        engine = await open_engine(self._engine_name, self.model, self._engine_config, log_path)
        self._live = EnginePolicy(engine, renderer, self._sampling, name=self.name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            await live.engine.aclose()
