"""Whether a run that was killed equals one that was not, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.chaos.audit import Play, Snapshot, take

_TIMINGS = {"wall_s", "wait_s", "learn_s", "sync_s", "use_engine", "use_learner", "use_envs", "engine_busy_s"}
_CLOCKED = {"wall_s", "timings", "turns"}


def differences(unbroken: Path, broken: Path) -> list[str]:
    """A line for everything in which two run folders differ, other than wall clocks."""
    ours, theirs = take(unbroken / "ledger.sqlite"), take(broken / "ledger.sqlite")
    return [
        *_compare_files(unbroken, broken, Path("model/model.safetensors")),
        *_compare_files(unbroken, broken, Path(f"checkpoints/version-{ours.last_step:08d}/learner.pt")),
        *_compare_steps(ours, theirs),
        *_compare_episodes(ours, theirs),
    ]


def _compare_files(unbroken: Path, broken: Path, name: Path) -> Iterator[str]:
    if not (broken / name).is_file():
        yield f"{name} is missing"
    elif (unbroken / name).read_bytes() != (broken / name).read_bytes():
        yield f"{name} differs"


def _compare_steps(ours: Snapshot, theirs: Snapshot) -> Iterator[str]:
    if ours.steps.keys() != theirs.steps.keys():
        yield f"{ours.last_step} steps and {theirs.last_step}"
        return
    for step, row in ours.steps.items():
        other = theirs.steps[step]
        if (row.groups, row.trace) != (other.groups, other.trace):
            yield f"step {step} trained other groups, or its gradients differ"
        left, right = _timeless(row.metrics), _timeless(other.metrics)
        if right["canary"] is None:  # it was killed before it was asked
            del left["canary"], right["canary"]
        for key in left:
            if left[key] != right[key]:
                yield f"{key} of step {step} is {right[key]!r}, not {left[key]!r}"


def _timeless(metrics: Any) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in _TIMINGS}


def _compare_episodes(ours: Snapshot, theirs: Snapshot) -> Iterator[str]:
    """Of all groups that were trained or dropped; what is in hand at the end depends on the clock."""
    for number, group in ours.groups.items():
        if group.state not in ("trained", "dropped"):
            continue
        if theirs.groups.get(number) != group:
            yield f"group {number} is {theirs.groups.get(number)}, not {group}"
            continue
        for position in range(group.size):
            key = (number, position)
            if _content(ours.plays[key]) != _content(theirs.plays[key]):
                yield f"episode {number}.{position} was played otherwise"


def _content(play: Play) -> tuple[Any, ...]:
    """All that an episode left but its seconds; the arrays to the byte."""
    record = json.loads(play.record)
    turns = [{key: value for key, value in turn.items() if not key.endswith("_s")} for turn in record["turns"]]
    return {key: value for key, value in record.items() if key not in _CLOCKED}, turns, play.trajectory
