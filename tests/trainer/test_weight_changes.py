"""Changes of weights: those that an engine of bfloat16 would hold and show, counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from palaestra.trainer._weight_changes import Changes, find_changes


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
    changes = find_changes(write(tmp_path / "before", w=before), write(tmp_path / "after", w=after), turn=0)
    assert changes.num_weights == count


def test_all_matrices_count(tmp_path: Path) -> None:
    before = write(tmp_path / "before", a=np.ones((2, 3), np.float32), b=np.ones((2, 2), np.float32))
    after = write(tmp_path / "after", a=np.full((2, 3), 1.5, np.float32), b=np.full((2, 2), 1.5, np.float32))
    assert find_changes(before, after, turn=0).num_weights == 10


def test_of_a_large_model_a_part_is_compared_and_in_the_end_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palaestra.trainer._weight_changes._MOST_COMPARED", 24)
    ones, twos = np.ones((30, 4), np.float32), np.full((30, 4), 2.0, np.float32)
    many = np.ones((3, 10, 4), np.float32)
    before = write(tmp_path / "before", a=ones, b=many)
    after = write(tmp_path / "after", a=twos, b=many + np.eye(10, 4, dtype=np.float32))
    counts = [find_changes(before, after, turn=turn).num_weights for turn in range(30)]
    assert max(counts) <= 24
    assert sum(counts) >= 120, "each weight of the first matrix has had its turn"
    assert any(count % 4 for count in counts), "and some of the others"


def test_what_is_left_of_a_small_step_is_all_of_it_between_two_numbers_and_nothing_on_one(tmp_path: Path) -> None:
    between = np.linspace(1.0, 2.0, 40_000, dtype=np.float32).reshape(200, 200)
    on = np.full((200, 200), 1.5, np.float32)
    for name, weights in (("between", between), ("on", on)):
        write(tmp_path / f"{name}-before", w=weights)
        write(tmp_path / f"{name}-after", w=weights + np.float32(1e-4))
    assert find_changes(tmp_path / "between-before", tmp_path / "between-after", turn=0).kept == pytest.approx(
        1, abs=0.1
    )
    assert find_changes(tmp_path / "on-before", tmp_path / "on-after", turn=0).kept == 0


def test_without_files_nothing_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", w=np.ones((2, 2), np.float32))
    assert find_changes(tmp_path / "gone", folder, turn=0) == Changes()
    assert find_changes(folder, tmp_path / "gone", turn=0) == Changes()
