"""Conversation <-> tokens for one model family, append-only.

Invariant: `extend(ids, ...)` starts with exactly `ids`. History is never re-tokenised, so what was sampled
is what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from palaestra.types import Message, ToolSpec


class Renderer(Protocol):
    """Renders the first prompt, extends it turn by turn, and parses what was sampled."""

    stop_ids: tuple[int, ...]
    """Tokens that end an assistant message."""
    num_blind: int
    """Extensions so far that were put together without the family's template, which would have rewritten history."""

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """Ids of the conversation so far, ending where the assistant begins to speak."""

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """`ids` (prompt plus what was sampled), then the new messages, then the assistant's opening."""

    def parse(self, ids: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        """The assistant message that the sampled ids spell; a call that does not parse is kept as malformed."""

    def encode_reply(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        """Ids, stop token included, with which the policy would have said `message`; inverse of `parse`."""
