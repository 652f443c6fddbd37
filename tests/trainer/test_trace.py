"""Traces: one changed bit is found and named; bytes there and back."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palaestra.trainer._fingerprint import fingerprints
from palaestra.trainer.trace import StepTrace


def make_trace() -> StepTrace:
    return StepTrace(
        names=("a.weight", "b.weight"),
        losses=np.array([0.25, 0.125]),
        grad_norms=np.array([1.0, 2.0]),
        fingerprints=np.arange(8, dtype=np.int64).reshape(2, 2, 2),
        made_on="cpu",
    )


@settings(max_examples=50)
@given(st.integers(1, 40), st.data())
def test_one_changed_bit_changes_the_fingerprint(length: int, data: st.DataObject) -> None:
    numbers = np.random.default_rng(length).normal(size=length).astype(np.float32)
    index, bit = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, 31))
    changed = numbers.copy()
    changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
    before, after = fingerprints([torch.from_numpy(numbers), torch.from_numpy(changed)])
    assert before.tolist() != after.tolist()


def test_words_that_changed_places_change_the_fingerprint() -> None:
    before, after = fingerprints([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])])
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_fingerprint_is_the_sum_by_hand() -> None:
    words = np.array([1.5, -2.0, 0.0], np.float32).view(np.int32).astype(np.int64)
    found, absent = fingerprints([torch.tensor([[1.5], [-2.0], [0.0]]), None])
    assert found.tolist() == [int(words.sum()), int(words[0] + 2 * words[1])]
    assert absent.tolist() == [0, 0]


def test_a_trace_survives_its_bytes() -> None:
    trace = make_trace()
    again = StepTrace.from_bytes(trace.to_bytes())
    assert trace.difference(again) is None
    assert (again.names, again.made_on) == (trace.names, "cpu")


def test_the_first_difference_is_named() -> None:
    trace = make_trace()
    prints = trace.fingerprints.copy()
    prints[1] += 1
    assert trace.difference(replace(trace, fingerprints=prints)) == (
        "the gradient of a.weight in update 2 of 2 differs, as do those of 1 others"
    )
    other_loss = replace(trace, losses=np.array([0.25, 0.5]), fingerprints=prints)
    assert "loss of update 2 of 2 is" in str(trace.difference(other_loss))
    assert "other parameters: 2 and 1" in str(trace.difference(replace(trace, names=("a.weight",))))


def test_damaged_bytes_are_named_or_mean_the_same() -> None:
    trace = make_trace()
    data = trace.to_bytes()
    num_named = 0
    for place in range(0, len(data), 4):
        try:
            found = StepTrace.from_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        except ValueError:
            num_named += 1
        else:
            assert trace.difference(found) is None
            assert np.array_equal(trace.grad_norms, found.grad_norms)
    assert num_named > len(data) / 8
    for length in range(0, len(data), 16):
        with pytest.raises(ValueError, match=r"Error|BadZipFile"):
            StepTrace.from_bytes(data[:length])


def test_what_is_said_of_an_array_is_not_read_before_its_checksum_was_compared() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array(["a" * 10_000]), losses=np.zeros(1))
    data = buffer.getvalue()
    place = data.index(b"}")
    with pytest.raises(ValueError, match=r"names\.npy"):
        StepTrace.from_bytes(data[:place] + b"(" + data[place + 1 :])


def test_gradients_that_are_all_zero_are_told_apart() -> None:
    trace = make_trace()
    assert not trace.is_zero
    assert replace(trace, fingerprints=np.zeros_like(trace.fingerprints)).is_zero
