"""Changes of weights: those that an engine of bfloat16 would hold and show, counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from palaestra.trainer._weight_changes import find_changes


def write(folder: Path, **tensors: NDArray[np.generic]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def matrix(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        (matrix(1.0, -1.0), matrix(1.0, -1.0), 0),
        (matrix(1.0, -1.0), matrix(1.0 + 2**-10, -1.0 - 2**-10), 0),  # a quarter of bfloat16's step there
        (matrix(1.0, -1.0), matrix(1.0 + 2**-7, -1.0), 1),
        (matrix(1.0 + 2**-9, 1.0), matrix(1.0 + 2**-8 + 2**-10, 1.0), 1),  # a quarter, over the edge
        (matrix(1.0, 1e-6), matrix(1.0, 2e-6), 0),  # far below its neighbour
        (np.array([1.0, 2.0], np.float32), np.array([2.0, 1.0], np.float32), 0),  # a vector
    ],
)
def test_a_change_is_what_rounding_and_sums_leave(
    tmp_path: Path, before: NDArray[np.float32], after: NDArray[np.float32], count: int
) -> None:
    assert count_changes(write(tmp_path / "before", w=before), write(tmp_path / "after", w=after)) == count


def test_all_matrices_count(tmp_path: Path) -> None:
    before = write(tmp_path / "before", a=np.ones((2, 3), np.float32), b=np.ones((2, 2), np.float32))
    after = write(tmp_path / "after", a=np.full((2, 3), 1.5, np.float32), b=np.full((2, 2), 1.5, np.float32))
    assert count_changes(before, after) == 10
