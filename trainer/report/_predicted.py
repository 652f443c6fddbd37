"""The step that `palaestra size` predicted beside the steps that were made.

Invariant: numbers stand side by side only when the run had exactly the settings that were predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from palaestra.trainer.sizing import PredictedSettings

_LEAST_STEPS = 3
_HELD = 0.25
_OTHER_EPISODES = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedTime:
    """One part of the step: seconds predicted, the median of those measured, and measured / predicted (None: of 0)."""

    name: str
    predicted_s: float
    measured_s: float
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows to be shown, none where there is nothing to compare, and what they say in words."""

    rows: tuple[ComparedTime, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"times": [asdict(row) for row in self.rows], "verdict": self.verdict}


_PARTS = (
    ("whole step", "step_s", "wall_s"),
    ("waiting for rollouts", "wait_s", "wait_s"),
    ("learning", "learn_s", "learn_s"),
    ("weight sync", "sync_s", "sync_s"),
)


def compare(
    predictions: Sequence[PredictedSettings], conditions: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> Comparison:
    """The prediction made for these `conditions` against steps that were made under them.

    The first step is left out where there are three or more: nothing was under way when it began.
    """
    made = [each for each in predictions if each.conditions == conditions]
    if not made:
        return Comparison(rows=(), verdict=_other_settings(predictions, conditions))
    if not steps:
        return Comparison(rows=(), verdict="No step was made with these settings: there is nothing to compare.")
    counted = steps[1:] if len(steps) >= _LEAST_STEPS else steps
    predicted = made[0].predicted.to_json()
    rows = tuple(
        _row(name, predicted[key], median(step[recorded] for step in counted)) for name, key, recorded in _PARTS
    )
    tokens = median(step["num_sampled_tokens"] for step in counted) / predicted["tokens"]
    return Comparison(rows=rows, verdict=_verdict(rows, len(counted), len(steps), tokens))


def _row(name: str, predicted_s: float, measured_s: float) -> ComparedTime:
    ratio = measured_s / predicted_s if predicted_s > 0 else None
    return ComparedTime(name=name, predicted_s=predicted_s, measured_s=measured_s, ratio=ratio)


def _verdict(rows: Sequence[ComparedTime], num_counted: int, num_steps: int, tokens: float) -> str:
    step, *parts = rows
    assert step.ratio is not None, "a predicted step takes time"
    held = "The prediction held" if abs(step.ratio - 1.0) <= _HELD else "The prediction did not hold"
    counted = f"the median of {num_counted} of {num_steps} steps"
    text = f"{held}: {counted} took {step.ratio:.2f} times the predicted seconds."
    # two errors can cancel out: a part that is off by what would break the whole is named
    for part in parts:
        if abs(part.measured_s - part.predicted_s) > _HELD * step.predicted_s:
            text += f" {part.name.capitalize()} took {part.measured_s:.2f} s instead of {part.predicted_s:.2f} s."
    if abs(tokens - 1.0) > _OTHER_EPISODES:
        text += f" A step sampled {tokens:.2f} times the tokens of the episodes that were measured."
    return text


def _other_settings(predictions: Sequence[PredictedSettings], conditions: Mapping[str, Any]) -> str:
    """Which settings differ from those of the prediction that comes nearest."""
    differing = min((_differing(each.conditions, conditions) for each in predictions), key=len, default=["all of them"])
    names = ", ".join(differing)
    return f"Not compared: the prediction was made for other settings ({names}). Run `palaestra size` for these."


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
