"""The terms every environment starts with: success, tool validity, efficiency, safety."""

from __future__ import annotations

from palaestra.rewards._stack import Reward
from palaestra.types import Transcript


class Success(Reward):
    """The environment's own check, in [0, 1]: hidden tests, the page's reward, the final database."""

    name = "success"

    async def value(self, transcript: Transcript) -> float:
        """`facts["success"]`; raises `KeyError` when the environment verified nothing."""
        return transcript.facts["success"]


class ToolValidity(Reward):
    """Share of tool calls that parsed and met the tool's schema, in [0, 1]; 1 when no call was made."""

    name = "tool_validity"

    async def value(self, transcript: Transcript) -> float:
        """`1 - invalid / calls` over the whole episode."""
        num_calls = sum(turn.num_calls for turn in transcript.turns)
        num_invalid = sum(turn.num_invalid_calls for turn in transcript.turns)
        return 1.0 - num_invalid / num_calls if num_calls else 1.0


class Efficiency(Reward):
    """Share of the turn budget left over, in [0, 1), and only for what succeeded.

    Without that condition a fast failure would beat a slow success.
    """

    name = "efficiency"

    def __init__(self, max_turns: int | None = None) -> None:
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {max_turns}")
        self.max_turns = max_turns

    async def value(self, transcript: Transcript) -> float:
        """`success * (1 - turns / max_turns)`, floored at 0; `max_turns` defaults to the environment's limit."""
        budget = self.max_turns or transcript.max_turns
        return transcript.facts["success"] * max(0.0, 1.0 - len(transcript.turns) / budget)


class Unsafe(Reward):
    """Number of unsafe acts that the environment counted, as `facts["unsafe"]`; 0 where it counts none."""

    name = "unsafe"

    async def value(self, transcript: Transcript) -> float:
        """`facts["unsafe"]`, a count of at least 0."""
        return transcript.facts.get("unsafe", 0.0)
