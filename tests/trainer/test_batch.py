"""Micro-batches: what predicts what, by hand, and nothing lost over any split."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.trainer.batch import TrainRow, check_rows, denominators, make_micro_batches, pack_by_length
from palaestra.types import Trajectory


def row(ids: list[int], sampled: list[int], advantage: float = 1.0, version: int = 0) -> TrainRow:
    """A row whose token at t has behaviour log-prob -t / 10 where it was sampled."""
    mask = np.isin(np.arange(len(ids)), sampled)
    trajectory = Trajectory(
        ids=np.array(ids, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -np.arange(len(ids)) / 10, 0.0).astype(np.float32),
        versions=np.where(mask, version, -1).astype(np.int32),
        turns=np.where(mask, 0, -1).astype(np.int16),
    )
    return TrainRow(trajectory=trajectory, advantage=advantage)


def test_two_rows_by_hand() -> None:
    rows = [row([10, 11, 12, 13, 14, 15], [2, 4], 0.5, version=3), row([20, 21, 22], [1, 2], -1.0, version=4)]
    (batch,) = make_micro_batches(rows, denominators(rows, "tokens", constant_length=1), max_tokens=100)
    # the short row comes first; the last sampled token is predicted, never an input; what follows it is cut off
    assert batch.ids_BP.tolist() == [[20, 21, 0, 0], [10, 11, 12, 13]]
    assert batch.index_B.tolist() == [1, 0]
    assert batch.row_N.tolist() == [0, 0, 1, 1]
    assert batch.position_N.tolist() == [0, 1, 1, 3]
    assert batch.target_N.tolist() == [21, 22, 12, 14]
    assert batch.behaviour_N.tolist() == pytest.approx([-0.1, -0.2, -0.2, -0.4])
    assert batch.advantage_N.tolist() == [-1.0, -1.0, 0.5, 0.5]
    assert batch.denominator_N.tolist() == [4.0] * 4
    assert batch.version_N.tolist() == [4, 4, 3, 3]
    assert batch.proximal_N is None


def test_proximal_follows_the_mask() -> None:
    plain = row([1, 2, 3, 4], [1, 3])
    filled = TrainRow(
        trajectory=plain.trajectory, advantage=1.0, proximal_T=np.array([9.0, -1.0, 9.0, -3.0], dtype=np.float32)
    )
    (batch,) = make_micro_batches([filled], np.ones(1, dtype=np.float32), max_tokens=100)
    assert batch.proximal_N is not None
    assert batch.proximal_N.tolist() == [-1.0, -3.0]


@pytest.mark.parametrize(
    ("kind", "expected"), [("tokens", [3.0, 3.0, 3.0]), ("sequences", [6.0, 3.0, 3.0]), ("constant", [30.0] * 3)]
)
def test_denominators_by_hand(kind: str, expected: list[float]) -> None:
    rows = [row([1, 2, 3], [1, 2]), row([1, 2, 3], [2]), row([1, 2], [])]
    assert denominators(rows, kind, constant_length=10).tolist() == expected  # type: ignore[arg-type]


@given(lengths=st.lists(st.integers(1, 40), max_size=30), max_tokens=st.integers(1, 200))
def test_packing_keeps_the_budget_and_every_row(lengths: list[int], max_tokens: int) -> None:
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    parts = pack_by_length(order, lengths, max_tokens)
    assert [index for part in parts for index in part] == order
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[index] for index in part) <= max_tokens


@given(st.data())
def test_every_sampled_token_is_predicted_once_from_the_token_before_it(data: st.DataObject) -> None:
    rows = []
    for _ in range(data.draw(st.integers(1, 6))):
        length = data.draw(st.integers(1, 12))
        sampled = data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=length - 1))
        rows.append(row(data.draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)), sorted(sampled)))
    expected = {
        (index, int(t)): (row.trajectory.ids[t - 1], row.trajectory.ids[t], row.trajectory.logprobs[t])
        for index, row in enumerate(rows)
        for t in np.flatnonzero(row.trajectory.loss_mask)
    }
    found = {}
    for batch in make_micro_batches(rows, np.ones(len(rows), dtype=np.float32), max_tokens=20):
        columns = (batch.row_N, batch.position_N, batch.target_N, batch.behaviour_N)
        for row_, position, target, behaviour in zip(*columns, strict=True):
            key = (int(batch.index_B[row_]), int(position) + 1)
            assert key not in found
            found[key] = (batch.ids_BP[row_, position], target, behaviour)
    assert found == expected


def test_bad_rows_are_named() -> None:
    good = row([1, 2, 3], [1])
    check_rows([good, row([1], [])], vocab_size=4)
    with pytest.raises(ValueError, match="row 1 has advantage nan"):
        check_rows([good, row([1, 2], [1], math.nan)], vocab_size=4)
    with pytest.raises(ValueError, match="row 0 has a token id outside the vocabulary of 3"):
        check_rows([good], vocab_size=3)
    with pytest.raises(ValueError, match="row 0 has a sampled first token"):
        check_rows([row([1, 2], [0])], vocab_size=4)
    with pytest.raises(ValueError, match="no sampled token in a batch of 1 rows"):
        check_rows([row([1, 2], [])], vocab_size=4)
    infinite = row([1, 2, 3], [1])
    infinite.trajectory.logprobs[1] = -math.inf
    with pytest.raises(ValueError, match="row 0 has a behaviour log-prob that is not finite"):
        check_rows([infinite], vocab_size=4)
