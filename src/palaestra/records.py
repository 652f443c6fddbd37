"""Episodes as records: JSON for people, bytes for token arrays; reading gives back exactly what was written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from palaestra.types import Episode, Failure, JsonObject, Message, Outcome, RewardTerm, Task, Trajectory, Turn

_ARRAYS = ("ids", "loss_mask", "logprobs", "versions", "turns")


def episode_to_json(episode: Episode) -> dict[str, Any]:
    """Everything but the trajectory's arrays, as a JSON object."""
    return {
        "id": episode.id,
        "task": asdict(episode.task),
        "outcome": episode.outcome.value,
        "success": episode.is_success,
        "reward": episode.reward,
        "terms": [asdict(term) for term in episode.terms],
        "facts": dict(episode.facts),
        "failure": asdict(episode.failure) if episode.failure else None,
        "messages": [message.to_json() for message in episode.messages],
        "turns": [_turn_to_json(turn) for turn in episode.turns],
        "wall_s": episode.wall_s,
        "timings": dict(episode.timings),
    }


def episode_from_json(value: JsonObject, trajectory: Trajectory | None) -> Episode:
    """Inverse of `episode_to_json`."""
    return Episode(
        id=value["id"],
        task=Task(**value["task"]),
        outcome=Outcome(value["outcome"]),
        messages=tuple(Message.from_json(message) for message in value["messages"]),
        turns=tuple(_turn_from_json(turn) for turn in value["turns"]),
        reward=value["reward"],
        terms=tuple(RewardTerm(**term) for term in value["terms"]),
        facts=value["facts"],
        trajectory=trajectory,
        failure=Failure(**value["failure"]) if value["failure"] else None,
        wall_s=value["wall_s"],
        timings=value["timings"],
    )


def trajectory_to_bytes(trajectory: Trajectory) -> bytes:
    """The five arrays in NumPy's npz format, uncompressed."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(trajectory, name) for name in _ARRAYS})
    return buffer.getvalue()


def trajectory_from_bytes(data: bytes) -> Trajectory:
    """Inverse of `trajectory_to_bytes`; raises `ValueError` on damaged bytes."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return Trajectory(**{name: arrays[name] for name in _ARRAYS})


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file so that it is there as a whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.writelines([text] if isinstance(text, str) else text)
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk itself: after a loss of power, what was renamed is there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_episodes(path: Path, episodes: Iterable[Episode]) -> None:
    """One JSON object a line, without token arrays; replaces the file as a whole."""
    write_records(path, (episode_to_json(episode) for episode in episodes))


def write_records(path: Path, records: Iterable[JsonObject]) -> None:
    """JSON objects, one a line; replaces the file as a whole."""
    # ASCII: an agent's text may hold lone surrogates, which UTF-8 has no bytes for
    write_whole(path, (json.dumps(record) + "\n" for record in records))


def read_episodes(path: Path) -> Iterator[Episode]:
    """Episodes written by `write_episodes`, in order."""
    with path.open() as file:
        for line in file:
            yield episode_from_json(json.loads(line), None)


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    messages = {"action": turn.action.to_json(), "observation": [m.to_json() for m in turn.observation]}
    numbers = ("num_calls", "num_invalid_calls", "policy_s", "env_s")
    return messages | {name: getattr(turn, name) for name in numbers}


def _turn_from_json(value: JsonObject) -> Turn:
    action = Message.from_json(value["action"])
    observation = tuple(Message.from_json(message) for message in value["observation"])
    return Turn(**{**value, "action": action, "observation": observation})
