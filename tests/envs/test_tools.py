"""Tools: the schema comes from the signature, and a body only sees arguments that met it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from palaestra.envs._tools import InvalidCallError, collect_tools, offered_tools, tool
from palaestra.errors import TaskError
from palaestra.types import ToolCall


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


class Point(BaseModel):
    x: int
    y: int = 0


class Shop:
    """Tools of many signatures."""

    @tool
    async def order(self, item: str, count: Annotated[int, Field(ge=1, le=9)] = 1) -> str:
        """Order an item."""
        return f"{count} {item}"

    @tool
    async def paint(self, colour: Literal["red", "blue"], size: Size, at: Point) -> str:
        """Paint it."""
        return f"{colour} {size} {at}"

    @tool
    async def stop(self) -> str:
        """Stop."""
        return "ok"

    async def helper(self) -> str:
        return "not a tool"


class SpecialShop(Shop):
    @tool
    async def order(self, item: str) -> str:  # type: ignore[override]
        """Order one item only."""
        return item

    @tool(form="compact", name="go")
    async def go_briefly(self, where: Literal["in", "out"]) -> str:
        """Go."""
        return where

    @tool(form="full", name="go")
    async def go_politely(self, where: str, please: bool) -> str:
        """Go, if you please."""
        return where


def check(cls: type, name: str, **arguments: Any) -> dict[str, Any]:
    return offered_tools(collect_tools(cls), "full")[name].check(ToolCall(name=name, arguments=arguments))


def test_the_schema_is_read_from_the_signature_and_the_docstring() -> None:
    specs = [bound.spec for bound in collect_tools(Shop)]
    assert [spec.name for spec in specs] == ["order", "paint", "stop"]
    assert specs[0].description == "Order an item."
    assert specs[0].parameters == {
        "type": "object",
        "properties": {
            "item": {"type": "string"},
            "count": {"type": "integer", "minimum": 1, "maximum": 9, "default": 1},
        },
        "required": ["item"],
    }
    assert specs[1].parameters["properties"]["colour"] == {"type": "string", "enum": ["red", "blue"]}
    assert set(specs[1].parameters["$defs"]) == {"Size", "Point"}
    assert specs[2].parameters == {"type": "object", "properties": {}, "required": []}


def test_a_subclass_replaces_a_tool_and_adds_some() -> None:
    full = offered_tools(collect_tools(SpecialShop), "full")
    assert list(full) == ["order", "paint", "stop", "go"]
    assert full["order"].spec.description == "Order one item only."


def test_each_form_is_offered_its_own_tool_of_a_shared_name() -> None:
    tools = collect_tools(SpecialShop)
    compact, full = offered_tools(tools, "compact")["go"], offered_tools(tools, "full")["go"]
    assert (compact.method_name, full.method_name) == ("go_briefly", "go_politely")
    assert compact.check(ToolCall(name="go", arguments={"where": "in"})) == {"where": "in"}


def test_two_tools_of_one_name_in_one_form_are_refused() -> None:
    class Twice(Shop):
        @tool(form="full", name="stop")
        async def stop_again(self) -> str:
            """Stop, again."""
            return "ok"

    assert len(offered_tools(collect_tools(Twice), "compact")) == 3
    with pytest.raises(TaskError, match="two tools of the full form are called 'stop'"):
        offered_tools(collect_tools(Twice), "full")


def test_arguments_arrive_typed_with_defaults() -> None:
    assert check(Shop, "order", item="tea") == {"item": "tea", "count": 1}
    assert check(Shop, "order", item="tea", count="3") == {"item": "tea", "count": 3}
    checked = check(Shop, "paint", colour="red", size="small", at={"x": 1})
    assert checked == {"colour": "red", "size": Size.SMALL, "at": Point(x=1)}


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("order", {}, "item: Field required"),
        ("order", {"item": "tea", "cuont": 1}, "cuont: Extra inputs are not permitted"),
        ("order", {"item": "tea", "count": 0}, "count: Input should be greater than or equal to 1"),
        ("order", {"item": None}, "item: Input should be a valid string"),
        ("order", {"item": "\ud800"}, "arguments: not Unicode text: surrogates not allowed"),
        ("paint", {"colour": "green", "size": "small", "at": {"x": 1}}, "colour: Input should be 'red' or 'blue'"),
        ("paint", {"colour": "red", "size": "small", "at": {"x": "q"}}, "at.x: Input should be a valid integer"),
        ("stop", {"now": True}, "now: Extra inputs are not permitted"),
    ],
)
def test_what_does_not_meet_the_schema_is_refused_by_name(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidCallError) as caught:
        check(Shop, name, **arguments)
    assert str(caught.value).startswith(words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(JSON)
def test_whatever_the_agent_sends_is_checked_or_refused(arguments: Any) -> None:
    for bound in collect_tools(Shop):
        try:
            checked = bound.check(ToolCall(name=bound.spec.name, arguments=arguments))
        except InvalidCallError:
            continue
        assert checked.keys() == bound.spec.parameters["properties"].keys()


def test_a_tool_must_be_async() -> None:
    with pytest.raises(TaskError, match=r"tool .*wrong must be an async function"):

        @tool  # type: ignore[type-var]
        def wrong() -> str:
            """Not async."""
            return ""


def test_a_tool_needs_a_docstring_and_types() -> None:
    class Silent:
        @tool
        async def hum(self) -> str:
            return ""

    class Untyped:
        @tool
        async def hum(self, tune) -> str:  # type: ignore[no-untyped-def]
            """Hum."""
            return ""

    with pytest.raises(TaskError, match="tool hum has no docstring; the agent reads it"):
        collect_tools(Silent)
    with pytest.raises(TaskError, match="tool hum: parameter tune has no type"):
        collect_tools(Untyped)
