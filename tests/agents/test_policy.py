"""The token record of an episode: append-only, exactly what was sampled, refused when a renderer rewrites history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.agents import EnginePolicy, Sampling, Session
from palaestra.agents.renderers import open_renderer
from palaestra.agents.renderers.compact import CompactRenderer
from palaestra.errors import ContextFullError, PolicyError
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import Message
from tests.toys import Echo, ToyEngine


class RecordingEngine(ToyEngine):
    """Remembers every prompt; replies are given one after the other."""

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        self.prompts: list[list[int]] = []
        super().__init__(lambda prompt, seed: list(replies[len(self.prompts) - 1]))
        self.version = 3

    async def generate(self, prompt, sampling, *, stop_ids, seed=None):  # type: ignore[no-untyped-def]
        self.prompts.append(list(prompt))
        return await super().generate(prompt, sampling, stop_ids=stop_ids, seed=seed)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> CompactRenderer:
    folder = make_tokenizer(["say said stop ok"] * 3, tmp_path_factory.mktemp("tokenizer"), vocab_size=400)
    opened = open_renderer(folder)
    assert isinstance(opened, CompactRenderer)
    return opened


def open_session(engine: ToyEngine, renderer: CompactRenderer, *, max_tokens: int = 64) -> Session:
    env = Echo()
    policy = EnginePolicy(engine, renderer, Sampling(max_tokens=max_tokens))
    return policy.session(env, env.make_task("train", 0), seed=5)


texts = st.text(max_size=20)
token_ids = st.integers(0, 360)


@settings(max_examples=60)
@given(
    replies=st.lists(st.lists(token_ids, min_size=1, max_size=12), min_size=2, max_size=4),
    answers=st.lists(texts, min_size=4, max_size=4),
)
async def test_every_prompt_starts_with_the_exact_ids_before_it(
    renderer: CompactRenderer, replies: list[list[int]], answers: list[str]
) -> None:
    engine = RecordingEngine(replies)
    session = open_session(engine, renderer)
    observation = (Message("user", answers[0]),)
    for turn in range(len(replies)):
        await session.act(observation)
        observation = (Message("tool", answers[turn % 4], name="say"),)
    for turn in range(1, len(replies)):
        before = engine.prompts[turn - 1] + replies[turn - 1]
        assert engine.prompts[turn][: len(before)] == before
    trajectory = session.trajectory()
    assert trajectory is not None
    assert trajectory.ids[trajectory.loss_mask].tolist() == [token for reply in replies for token in reply]
    assert np.unique(trajectory.turns[trajectory.loss_mask]).tolist() == list(range(len(replies)))
    assert set(trajectory.versions[trajectory.loss_mask].tolist()) == {3}


class Rewriter(CompactRenderer):
    """Drops the first token of history, as templates that trim reasoning do."""

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        return super().extend(ids, messages)[1:]


async def test_rewritten_history_is_refused(renderer: CompactRenderer) -> None:
    rewriter = Rewriter.__new__(Rewriter)
    rewriter.__dict__.update(renderer.__dict__)
    session = open_session(RecordingEngine([[40], [41]]), rewriter)
    await session.act((Message("user", "say ok"),))
    with pytest.raises(PolicyError, match="changed history"):
        await session.act((Message("tool", "ok"),))


async def test_conversation_that_fills_the_context_says_so(renderer: CompactRenderer) -> None:
    engine = RecordingEngine([[40] * 60] * 20)
    session = open_session(engine, renderer)

    async def talk() -> None:
        for _ in range(20):
            await session.act((Message("user", "say ok"),))

    with pytest.raises(ContextFullError):
        await talk()
    assert max(len(prompt) for prompt in engine.prompts) < engine.max_model_len


def test_trajectory_before_the_first_reply_is_none(renderer: CompactRenderer) -> None:
    assert open_session(RecordingEngine([]), renderer).trajectory() is None


async def test_model_policy_must_be_entered(tmp_path: Path) -> None:
    from palaestra.agents import ModelPolicy

    env = Echo()
    with pytest.raises(PolicyError, match="enter the policy first"):
        ModelPolicy(tmp_path).session(env, env.make_task("train", 0), seed=0)
