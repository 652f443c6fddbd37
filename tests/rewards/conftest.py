"""Shared by the reward tests: a finished conversation to score."""

from __future__ import annotations

from collections.abc import Mapping

from palaestra.types import Message, Outcome, Task, Transcript, Turn

TASK = Task(id="test/T-v0/train/0", env_id="test/T-v0", split="train", seed=0)


def make_transcript(
    facts: Mapping[str, float] | None = None, turns: tuple[tuple[int, int], ...] = ((1, 0),), max_turns: int = 8
) -> Transcript:
    """A transcript with these facts (a full success by default) and turns of (calls, invalid calls)."""
    said = Message("assistant", "x")
    return Transcript(
        task=TASK,
        turns=tuple(Turn(action=said, observation=(), num_calls=n, num_invalid_calls=bad) for n, bad in turns),
        facts={"success": 1.0} if facts is None else facts,
        outcome=Outcome.SCORED,
        max_turns=max_turns,
    )
