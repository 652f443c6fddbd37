"""Gymnasium spaces over messages: what an agent may say, and what an environment may answer.

Gymnasium's `Text` space admits only alphanumerics, so these are spaces of their own. Any JSON-safe Unicode
text is in the space; samples come from the tools' schemas, so a random agent makes calls that parse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Space

from palaestra.types import JsonObject, Message, Observation, ToolCall, ToolSpec

_WORDS = ("yes", "no", "ok", "done", "open", "close", "high", "low", "a", "b", "x", "y", "1", "2", "3")
_MAX_INTEGER = 9


class ActionSpace(Space[Message]):
    """All assistant messages. Samples one tool call with random arguments, or words where there are no tools."""

    def __init__(self, tools: Sequence[ToolSpec], seed: int | np.random.Generator | None = None) -> None:
        super().__init__(dtype=np.object_, seed=seed)
        self.tools = tuple(tools)

    @property
    def is_np_flattenable(self) -> bool:
        """Messages have no fixed length."""
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Message:
        """A random assistant message; masks are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("ActionSpace takes no mask or probability")
        rng = self.np_random
        if not self.tools:
            return Message("assistant", str(rng.choice(_WORDS)))
        tool = self.tools[int(rng.integers(len(self.tools)))]
        return Message("assistant", tool_calls=(ToolCall(name=tool.name, arguments=_arguments(tool.parameters, rng)),))

    def contains(self, x: Any) -> bool:
        """Whether `x` is a message of the assistant."""
        return isinstance(x, Message) and x.role == "assistant"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActionSpace) and self.tools == other.tools

    def __repr__(self) -> str:
        return f"ActionSpace({[tool.name for tool in self.tools]})"


class ObservationSpace(Space[Observation]):
    """All tuples of messages from the environment's side: system, user and tool roles."""

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(dtype=np.object_, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Messages have no fixed length."""
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Observation:
        """One user message of one random word; masks are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("ObservationSpace takes no mask or probability")
        return (Message("user", str(self.np_random.choice(_WORDS))),)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a tuple of messages, none of them the assistant's."""
        return isinstance(x, tuple) and all(isinstance(m, Message) and m.role != "assistant" for m in x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObservationSpace)

    def __repr__(self) -> str:
        return "ObservationSpace()"


def _arguments(schema: JsonObject, rng: np.random.Generator) -> dict[str, Any]:
    return {name: _value(field, schema, rng) for name, field in schema.get("properties", {}).items()}


def _value(field: JsonObject, schema: JsonObject, rng: np.random.Generator) -> Any:
    if "$ref" in field:
        return _value(schema["$defs"][str(field["$ref"]).rpartition("/")[2]], schema, rng)
    if "enum" in field:
        return field["enum"][int(rng.integers(len(field["enum"])))]
    if "const" in field:
        return field["const"]
    kind = field.get("type")
    if kind == "integer":
        low, high = _range(field, _MAX_INTEGER)
        return int(rng.integers(low, high, endpoint=True))
    if kind == "number":
        return float(rng.uniform(*_range(field, 1)))
    if kind == "boolean":
        return bool(rng.integers(2))
    if kind == "array":
        return [_value(field.get("items", {}), schema, rng) for _ in range(int(rng.integers(1, 3)))]
    if kind == "object":
        return {name: _value(child, schema, rng) for name, child in field.get("properties", {}).items()}
    if "anyOf" in field:
        return _value(field["anyOf"][int(rng.integers(len(field["anyOf"])))], schema, rng)
    if kind == "null":
        return None
    return str(rng.choice(field.get("examples", _WORDS)))


def _range(field: JsonObject, span: int) -> tuple[Any, Any]:
    """The bounds of a number; one that the schema leaves open is `span` from the other, 0 to `span` without both."""
    low, high = field.get("minimum"), field.get("maximum")
    if low is None:
        low = 0 if high is None or high >= 0 else high - span
    return low, low + span if high is None else high
