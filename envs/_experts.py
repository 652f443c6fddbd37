"""Scripted experts: an environment's proof of solvability, the source of demonstrations, an upper line.

An expert is a function of the conversation alone: whatever was said so far, it knows the best next message
and, for demonstrations that leave reinforcement learning something to learn, plausible slips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from palaestra.types import Message, Task


@dataclass(frozen=True, slots=True)
class Decision:
    """The best next message, and mistakes that somebody less skilled would make here (may be empty)."""

    best: Message
    slips: tuple[Message, ...] = ()


class Expert(Protocol):
    """Plays an environment's tasks through the public interface; stateless, so that it recovers from slips."""

    def decide(self, task: Task, conversation: Sequence[Message]) -> Decision:
        """What to say next, given the task's reference data and everything said so far."""
