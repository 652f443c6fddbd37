"""The nouns as values: they survive JSON and refuse to be inconsistent."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.types import Episode, Failure, Group, Message, Outcome, Task, ToolCall, ToolSpec, Trajectory

TASK = Task(id="test/T-v0/train/3", env_id="test/T-v0", split="train", seed=3, data={"word": "ant"})

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.builds(
    ToolCall, name=st.text(), arguments=st.dictionaries(st.text(), JSON, max_size=3), id=st.text(), malformed=st.text()
)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.text(),
    tool_calls=st.lists(CALLS, max_size=3).map(tuple),
    name=st.text(),
    tool_call_id=st.text(),
)


def trajectory(mask: list[bool], versions: list[int], **changes: Any) -> Trajectory:
    num = len(mask)
    arrays: dict[str, Any] = {
        "ids": np.arange(num, dtype=np.int32),
        "loss_mask": np.array(mask, np.bool_),
        "logprobs": np.zeros(num, np.float32),
        "versions": np.array(versions, np.int32),
        "turns": np.zeros(num, np.int16),
    }
    return Trajectory(**{**arrays, **changes})


def episode(outcome: Outcome, reward: float | None, trajectory: Trajectory | None = None, **facts: float) -> Episode:
    return Episode(
        id="e1",
        task=TASK,
        outcome=outcome,
        messages=(),
        turns=(),
        reward=reward,
        terms=(),
        facts=facts,
        trajectory=trajectory,
        failure=None if reward is not None else Failure(kind="SandboxError", message="gone", boundary="env"),
        wall_s=0.1,
    )


@given(MESSAGES)
def test_a_message_survives_json(message: Message) -> None:
    assert Message.from_json(json.loads(json.dumps(message.to_json()))) == message


def test_a_messages_json_leaves_out_what_is_empty() -> None:
    assert Message("user").to_json() == {"role": "user", "content": ""}
    assert Message("tool", "ok", name="stop").to_json() == {"role": "tool", "content": "ok", "name": "stop"}


def test_a_tool_spec_has_the_openai_form() -> None:
    spec = ToolSpec(name="say", description="Say it.", parameters={"type": "object", "properties": {}})
    function = {"name": "say", "description": "Say it.", "parameters": {"type": "object", "properties": {}}}
    assert spec.to_json() == {"type": "function", "function": function}


@pytest.mark.parametrize("value", [TASK, Message("user"), ToolCall(name="x"), trajectory([True], [0])])
def test_values_cannot_be_changed(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_a_trajectory_counts_what_was_sampled() -> None:
    sampled = trajectory([False, True, True, False, True], [-1, 4, 4, -1, 3])
    assert (len(sampled), sampled.num_sampled, sampled.oldest_version) == (5, 3, 3)


def test_arrays_of_a_trajectory_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match=r"trajectory arrays differ in length: \[1, 2\]"):
        trajectory([True, True], [0, 0], turns=np.zeros(1, np.int16))


def test_a_sampled_token_needs_a_version() -> None:
    with pytest.raises(ValueError, match="a sampled token has no policy version"):
        trajectory([True, True], [0, -1])


def test_trajectories_compare_by_value() -> None:
    one = trajectory([False, True], [-1, 2])
    assert one == trajectory([False, True], [-1, 2])
    assert one != trajectory([False, True], [-1, 3])
    assert one != trajectory([True], [2])
    assert one != "something else"
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("outcome", list(Outcome))
def test_exactly_scored_and_truncated_episodes_have_a_number(outcome: Outcome) -> None:
    has_number = outcome in (Outcome.SCORED, Outcome.TRUNCATED)
    kept = episode(outcome, 0.0 if has_number else None)
    assert kept.env_id == "test/T-v0"
    with pytest.raises(ValueError, match=f"episode e1: outcome {outcome} with reward"):
        episode(outcome, None if has_number else 0.0)


def test_success_needs_a_score_and_the_full_fact() -> None:
    assert episode(Outcome.SCORED, 1.0, success=1.0).is_success
    assert not episode(Outcome.SCORED, 1.0, success=0.99).is_success
    assert not episode(Outcome.SCORED, 1.0).is_success
    assert not episode(Outcome.TRUNCATED, 1.0, success=1.0).is_success


def test_a_groups_oldest_version_is_over_all_sampled_tokens() -> None:
    members = (
        episode(Outcome.SCORED, 1.0, trajectory([True], [7])),
        episode(Outcome.SCORED, 1.0, trajectory([False, True, True], [-1, 6, 5])),
        episode(Outcome.TRUNCATED, 0.0, trajectory([False], [-1])),
        episode(Outcome.INFRA_ERROR, None),
    )
    assert Group(id="g", task=TASK, episodes=members).oldest_version == 5
    assert Group(id="g", task=TASK, episodes=members[2:]).oldest_version is None


def test_outcomes_are_their_names_in_json() -> None:
    assert json.dumps([Outcome.SCORED, Outcome.INFRA_ERROR]) == '["scored", "infra_error"]'
