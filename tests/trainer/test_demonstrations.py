"""Demonstrations: the same at any concurrency, sloppy where asked, and token by token what the policy lives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from palaestra.agents.renderers.compact import CompactRenderer
from palaestra.envs import EnvSuite
from palaestra.errors import TaskError
from palaestra.trainer.demonstrations import Demonstration, collect, texts_of, tokenize
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import Episode, Message, ToolSpec
from tests.toys import call, register_echo

ENV_ID = "test/Echo-v0"
TOOLS = (
    ToolSpec(
        name="say", description="Say it.", parameters={"type": "object", "properties": {"word": {"type": "string"}}}
    ),
    ToolSpec(name="stop", description="Stop.", parameters={"type": "object", "properties": {}}),
)


@pytest.fixture
def suite() -> EnvSuite:
    register_echo()
    return EnvSuite({ENV_ID: 1.0}, form="compact")


@pytest.fixture
def renderer(tmp_path: Path) -> CompactRenderer:
    return CompactRenderer.from_folder(make_tokenizer(["say stop ant said ok"] * 2, tmp_path))


async def test_a_clean_expert_solves_everything(suite: EnvSuite) -> None:
    demonstrations = await collect(suite, 12, skill=1.0, seed=0)
    assert [d.task_id for d in demonstrations] == [task.id for task in suite.tasks(12)]
    assert all(d.is_success for d in demonstrations)


async def test_the_same_seed_gives_the_same_play_at_any_concurrency(suite: EnvSuite) -> None:
    one = await collect(suite, 40, skill=0.5, seed=3, concurrency=1)
    many = await collect(suite, 40, skill=0.5, seed=3, concurrency=16)
    other = await collect(suite, 40, skill=0.5, seed=4, concurrency=16)
    assert one == many
    assert [d.messages for d in one] != [d.messages for d in other]


async def test_a_sloppy_expert_slips_as_often_as_asked(suite: EnvSuite) -> None:
    demonstrations = await collect(suite, 400, skill=0.8, seed=0)
    # one decision in each episode has a slip, and with it the episode fails: 0.8 within four standard errors
    assert abs(np.mean([d.is_success for d in demonstrations]) - 0.8) < 4 * (0.16 / 400) ** 0.5


async def test_start_and_split_choose_other_tasks(suite: EnvSuite) -> None:
    later = await collect(suite, 3, skill=1.0, seed=0, split="validation", start=5)
    assert [d.task_id for d in later] == [f"{ENV_ID}/validation/{index}" for index in (5, 6, 7)]


async def test_each_episode_is_announced_as_it_ends(suite: EnvSuite) -> None:
    heard: list[Episode] = []
    await collect(suite, 5, skill=1.0, seed=0, on_episode=heard.append)
    assert sorted(episode.id for episode in heard) == sorted(task.id for task in suite.tasks(5))


async def test_when_nearly_all_fail_the_first_reason_is_told(suite: EnvSuite) -> None:
    broken = EnvSuite({ENV_ID: 1.0}, form="compact", options={ENV_ID: {"fault": "begin"}})
    with pytest.raises(TaskError, match=r"5 of 5 demonstrations failed.*no box to be had"):
        await collect(broken, 5, skill=1.0, seed=0)


def demonstration(*messages: Message) -> Demonstration:
    return Demonstration(task_id="t", messages=messages, tools=TOOLS, is_success=True)


def test_tokens_are_the_prompts_and_replies_that_a_policy_would_live(renderer: CompactRenderer) -> None:
    say, stop = call("say", word="ant"), call("stop")
    user, tool = Message("user", "say ant"), Message("tool", "said ant", name="say")
    (trajectory,) = tokenize([demonstration(user, say, tool, stop, Message("tool", "ok"))], renderer)
    prompt = renderer.start([user], TOOLS)
    first = renderer.encode_reply(say, TOOLS)
    second = renderer.extend([*prompt, *first], [tool])
    last = renderer.encode_reply(stop, TOOLS)
    assert trajectory.ids.tolist() == [*second, *last]  # what was said after the last reply is left out
    expected = [False] * len(prompt) + [True] * len(first) + [False] * (len(second) - len(prompt) - len(first))
    assert trajectory.loss_mask.tolist() == expected + [True] * len(last)
    assert set(trajectory.turns[trajectory.loss_mask].tolist()) == {0, 1}
    assert set(trajectory.turns[: len(prompt)].tolist()) == {-1}
    assert set(trajectory.versions[trajectory.loss_mask].tolist()) == {0}


def test_the_replies_alone_are_learned(renderer: CompactRenderer) -> None:
    (trajectory,) = tokenize([demonstration(Message("user", "say ant"), call("say", word="ant"))], renderer)
    text = renderer._decode(trajectory.ids[trajectory.loss_mask].tolist())
    assert text == "<call> say<arg> ant</call>"


def test_a_conversation_without_a_reply_is_refused(renderer: CompactRenderer) -> None:
    with pytest.raises(ValueError, match="no reply"):
        tokenize([demonstration(Message("user", "say ant"))], renderer)


def test_a_tokenizer_sees_every_text_calls_included() -> None:
    told = demonstration(Message("user", "say ant"), call("say", word="ant"), Message("tool", "said ant"))
    assert list(texts_of([told])) == ["say ant", "", "say", "ant", "said ant"]
