"""Spaces over messages: seeded samples are in the space, and sampled calls meet their schema."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from palaestra.envs._spaces import ActionSpace, ObservationSpace
from palaestra.envs._tools import collect_tools, tool
from palaestra.types import Message, ToolCall


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


class Point(BaseModel):
    x: int
    where: Size


class Tools:
    @tool
    async def numbers(
        self,
        plain: int,
        small: Annotated[int, Field(ge=3, le=4)],
        large: Annotated[int, Field(ge=1000)],
        negative: Annotated[int, Field(le=-5)],
        share: float,
        heat: Annotated[float, Field(ge=50.0)],
    ) -> str:
        """Numbers in ranges, some open at one end."""
        return ""

    @tool
    async def shapes(
        self, at: Point, sizes: list[Size], only: Literal["this"], maybe: int | None, flag: bool, none: None
    ) -> str:
        """Nested things."""
        return ""

    @tool
    async def words(self, name: Annotated[str, Field(examples=["ana", "ben"])], text: str) -> str:
        """Words."""
        return ""


BOUND = {bound.spec.name: bound for bound in collect_tools(Tools)}
SPECS = tuple(bound.spec for bound in BOUND.values())


def test_sampled_calls_meet_the_schema_of_every_tool() -> None:
    space = ActionSpace(SPECS, seed=0)
    seen = set()
    for _ in range(300):
        message = space.sample()
        assert space.contains(message)
        (call,) = message.tool_calls
        BOUND[call.name].check(call)
        seen.add(call.name)
    assert seen == set(BOUND)


def test_examples_of_a_string_are_what_is_sampled() -> None:
    space = ActionSpace([BOUND["words"].spec], seed=0)
    assert {space.sample().tool_calls[0].arguments["name"] for _ in range(50)} == {"ana", "ben"}


@pytest.mark.parametrize("specs", [SPECS, ()])
def test_one_seed_samples_the_same(specs: Any) -> None:
    one, other = ActionSpace(specs, seed=3), ActionSpace(specs, seed=3)
    assert [one.sample() for _ in range(20)] == [other.sample() for _ in range(20)]


def test_without_tools_words_are_sampled() -> None:
    message = ActionSpace((), seed=0).sample()
    assert message.content
    assert not message.tool_calls


def test_any_text_or_call_of_the_assistant_is_an_action_and_nothing_else() -> None:
    space = ActionSpace(SPECS)
    assert space.contains(Message("assistant", "Ω \n"))
    assert space.contains(Message("assistant", tool_calls=(ToolCall(name="unknown", malformed="<"),)))
    for wrong in (Message("user", "x"), "x", None, (Message("assistant"),)):
        assert not space.contains(wrong)


def test_observations_are_tuples_of_messages_from_the_other_side() -> None:
    space = ObservationSpace(seed=0)
    assert space.contains(space.sample())
    assert space.contains(())
    assert space.contains((Message("system", "x"), Message("user", "y"), Message("tool", "z")))
    for wrong in ([Message("user")], (Message("assistant"),), ("x",), "x"):
        assert not space.contains(wrong)


def test_spaces_are_equal_by_tools() -> None:
    assert ActionSpace(SPECS, seed=1) == ActionSpace(SPECS, seed=2)
    assert ActionSpace(SPECS) != ActionSpace(SPECS[:1])
    assert ObservationSpace() == ObservationSpace()
    assert ObservationSpace() != ActionSpace(())
    assert repr(ActionSpace(SPECS)) == "ActionSpace(['numbers', 'shapes', 'words'])"
    assert not ActionSpace(SPECS).is_np_flattenable


@pytest.mark.parametrize("space", [ActionSpace(SPECS), ObservationSpace()])
@pytest.mark.parametrize("kind", ["mask", "probability"])
def test_masks_are_refused(space: ActionSpace | ObservationSpace, kind: str) -> None:
    with pytest.raises(ValueError, match="takes no mask or probability"):
        space.sample(**{kind: 1})
