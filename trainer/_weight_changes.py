"""How many weights differ between two published versions, as the coarsest engine would hold them.

Invariant: what bfloat16 rounds away is no change, and neither is one that no sum can show: a vector's (biases begin at
zero, where the smallest step changes all bits), or one far below a matrix's other weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

_FILE = "model.safetensors"
_HALF_STEP = 2.0**-9
"""Of bfloat16's steps, relative to the number."""


def count_changes(before: Path, after: Path) -> int:
    """Weights of the matrices in folder `after` that visibly differ from those of `before`."""
    with safe_open(before / _FILE, framework="numpy") as old, safe_open(after / _FILE, framework="numpy") as new:
        return sum(_count(old.get_tensor(name), new.get_tensor(name)) for name in new.offset_keys())


def _count(old: NDArray[Any], new: NDArray[Any]) -> int:
    if new.ndim < 2 or new.dtype != np.float32:
        return 0
    visible = _HALF_STEP * float(np.sqrt(np.mean(np.square(new))))
    return int(np.count_nonzero(np.abs(_rounded(new) - _rounded(old)) > visible))


def _rounded(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest number of bfloat16, which is the upper half of a float32."""
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
