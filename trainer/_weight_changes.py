"""How two published versions differ, as the coarsest engine would hold them.

Invariants: what bfloat16 rounds away is no change, and neither is one that no sum can show: a vector's (biases begin at
zero, where the smallest step changes all bits), or one far below a matrix's other weights. Time and memory do not grow
with the model: of a large one a part is compared, another one each turn, so that a count is one from below.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

_FILE = "model.safetensors"
_HALF_STEP = 2.0**-9
"""Of bfloat16's steps, relative to the number."""
_MOST_COMPARED = 1 << 22
"""Weights that are compared each turn, and some more where matrices have few rows."""


class Changes(NamedTuple):
    """What came of a step: weights that visibly differ, and how much of the step is left once they are rounded.

    `kept` is 1 on average where the weights are anywhere between two numbers of bfloat16, however small the step is;
    near 0 where they began on such numbers, as a published model's do, and have not gone far.
    """

    num_weights: int = 0
    kept: float = 0.0


def find_changes(before: Path, after: Path, *, turn: int) -> Changes:
    """Compare the matrices in two folders, of large models the part whose turn it is; no changes without files."""
    num_weights, along, squared = 0, 0.0, 0.0
    try:
        with safe_open(before / _FILE, framework="numpy") as old, safe_open(after / _FILE, framework="numpy") as new:
            shapes = {name: tuple(new.get_slice(name).get_shape()) for name in new.offset_keys()}
            share = _MOST_COMPARED / max(1, sum(map(math.prod, shapes.values())))
            for name, shape in shapes.items():
                if len(shape) < 2 or new.get_slice(name).get_dtype() != "F32":
                    continue
                part = _part(shape, share, turn)
                left, right = old.get_slice(name)[part], new.get_slice(name)[part]
                kept, step = _rounded(right) - _rounded(left), right - left
                num_weights += _count_visible(kept, right)
                along += float(np.vdot(kept, step))
                squared += float(np.vdot(step, step))
    except FileNotFoundError:  # somebody clears the folder, which is no fault of the engine's
        return Changes()
    return Changes(num_weights, along / squared if squared else 0.0)


def _part(shape: tuple[int, ...], share: float, turn: int) -> tuple[slice, ...]:
    """Rows of a matrix, of which there may be many side by side: as many as `share` allows, each turn others."""
    if share >= 1:
        return tuple(slice(0, size) for size in shape)
    *many, num_rows, _ = shape
    taken = min(num_rows, math.ceil(share * math.prod(many) * num_rows))
    start = turn * taken % num_rows
    return (*(slice(turn % size, turn % size + 1) for size in many), slice(start, min(start + taken, num_rows)))


def _count_visible(kept: NDArray[Any], new: NDArray[Any]) -> int:
    visible = _HALF_STEP * math.sqrt(float(np.vdot(new, new)) / new.size)
    return int(np.count_nonzero(np.abs(kept) > visible))


def _rounded(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest number of bfloat16, which is the upper half of a float32."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
