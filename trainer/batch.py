"""From trajectories to padded micro-batches, with exact bookkeeping of what predicts what.

Invariants: the logits at position t predict token t + 1; only tokens of the loss mask are predicted, each exactly
once; what follows the last sampled token is cut off, since no prediction reads it; padding is on the right, so under
causal attention no real token sees it.

Shape legend: `R` rows of a batch, `T` tokens of one row, `B` rows and `P` positions of a micro-batch (padded),
`N` sampled tokens of a micro-batch, ordered by row, then position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from palaestra.types import Trajectory

Denominator = Literal["tokens", "sequences", "constant"]
"""`tokens`: all sampled tokens of the batch, so each counts the same (DAPO, arXiv:2503.14476 eq. 8).
`sequences`: each trajectory counts the same (GRPO, arXiv:2402.03300 eq. 3).
`constant`: trajectories times a fixed length, free of length bias (Dr. GRPO, arXiv:2503.20783)."""

_MAX_ADVANTAGE = float(np.finfo(np.float32).max)

Floats: TypeAlias = NDArray[np.float32]
Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRow:
    """A trajectory and the advantage of its sampled tokens.

    `proximal_T`, shape (T,), holds the proximal policy's log-probs for the losses that need them.
    """

    trajectory: Trajectory
    advantage: float
    proximal_T: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows that go through the model together.

    `ids_BP` is padded with 0. The other arrays have shape (N,): the logits at `[row, position]` predict `target`;
    `row` counts within the micro-batch, `index_B` gives each row's place in the batch. `proximal` is None when
    some row has none.
    """

    ids_BP: Indices
    index_B: Indices
    row_N: Indices
    position_N: Indices
    target_N: Indices
    behaviour_N: Floats
    advantage_N: Floats
    denominator_N: Floats
    version_N: Indices
    proximal_N: Floats | None

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens."""
        return len(self.target_N)


def make_micro_batches(rows: Sequence[TrainRow], denominator_R: Floats, *, max_tokens: int) -> list[MicroBatch]:
    """Every row with sampled tokens, sorted by length; rows times positions is at most `max_tokens` each.

    A row that is longer than `max_tokens` is a micro-batch of its own.
    """
    lengths = [_num_inputs(row.trajectory) for row in rows]
    order = sorted((r for r in range(len(rows)) if lengths[r]), key=lambda r: lengths[r])
    return [_pad(rows, denominator_R, indices) for indices in pack_by_length(order, lengths, max_tokens)]


def pack_by_length(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split `order`, sorted by rising length, so that count times longest is at most `max_tokens` in each part."""
    parts: list[list[int]] = []
    for index in order:
        if parts and (len(parts[-1]) + 1) * lengths[index] <= max_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def denominators(rows: Sequence[TrainRow], kind: Denominator, *, constant_length: int) -> Floats:
    """What the loss of each row's tokens is divided by, shape (R,); fixed by the mask, before any loss looks."""
    sampled_R = np.array([row.trajectory.num_sampled for row in rows], dtype=np.float32)
    if kind == "tokens":
        return np.full_like(sampled_R, sampled_R.sum())
    if kind == "sequences":
        return np.maximum(sampled_R, 1) * len(rows)
    return np.full_like(sampled_R, len(rows) * constant_length)


def check_rows(rows: Sequence[TrainRow], vocab_size: int) -> None:
    """Raise `ValueError` that names the first row with which no step may be made."""
    if not any(row.trajectory.num_sampled for row in rows):
        raise ValueError(f"no sampled token in a batch of {len(rows)} rows")
    for index, row in enumerate(rows):
        trajectory = row.trajectory
        if not abs(row.advantage) <= _MAX_ADVANTAGE:  # also when it is nan
            raise ValueError(f"row {index} has advantage {row.advantage}")
        if not np.all(np.isfinite(trajectory.logprobs[trajectory.loss_mask])):
            raise ValueError(f"row {index} has a behaviour log-prob that is not finite")
        if len(trajectory) and (trajectory.ids.min() < 0 or trajectory.ids.max() >= vocab_size):
            raise ValueError(f"row {index} has a token id outside the vocabulary of {vocab_size}")
        if len(trajectory) and trajectory.loss_mask[0]:
            raise ValueError(f"row {index} has a sampled first token, which nothing predicts")


def _num_inputs(trajectory: Trajectory) -> int:
    sampled = np.flatnonzero(trajectory.loss_mask)
    return int(sampled[-1]) if len(sampled) else 0


def _pad(rows: Sequence[TrainRow], denominator_R: Floats, indices: Sequence[int]) -> MicroBatch:
    chosen = [rows[index] for index in indices]
    trajectories = [row.trajectory for row in chosen]
    masks = [t.loss_mask for t in trajectories]
    counts = [t.num_sampled for t in trajectories]
    num_inputs = [_num_inputs(t) for t in trajectories]
    ids_BP = np.zeros((len(chosen), max(num_inputs)), dtype=np.int64)
    for ids_P, trajectory, length in zip(ids_BP, trajectories, num_inputs, strict=True):
        ids_P[:length] = trajectory.ids[:length]
    index_B = np.array(indices, dtype=np.int64)
    proximal = [row.proximal_T[mask] for row, mask in zip(chosen, masks, strict=True) if row.proximal_T is not None]
    return MicroBatch(
        ids_BP=ids_BP,
        index_B=index_B,
        row_N=np.repeat(np.arange(len(chosen)), counts),
        position_N=np.concatenate([np.flatnonzero(mask) - 1 for mask in masks]),
        target_N=np.concatenate([t.ids[t.loss_mask] for t in trajectories]).astype(np.int64),
        behaviour_N=np.concatenate([t.logprobs[t.loss_mask] for t in trajectories]),
        advantage_N=np.repeat(np.array([row.advantage for row in chosen], dtype=np.float32), counts),
        denominator_N=np.repeat(denominator_R[index_B], counts),
        version_N=np.concatenate([t.versions[t.loss_mask] for t in trajectories]).astype(np.int64),
        proximal_N=np.concatenate(proximal) if len(proximal) == len(chosen) else None,
    )
