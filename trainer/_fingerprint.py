"""Fingerprints of tensors, computed where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 22


def fingerprints(tensors: Sequence[Tensor | None]) -> NDArray[np.int64]:
    """Two 64-bit sums for each float32 tensor, shape (P, 2): of its words, and of its words times their positions.

    Both wrap around. The second one sees words that changed places; an absent tensor has zeros.
    """
    return torch.stack([_fingerprint(tensor).cpu() for tensor in tensors]).numpy()


def _fingerprint(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        return torch.zeros(2, dtype=torch.int64)
    words = tensor.detach().contiguous().reshape(-1).view(torch.int32)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK):
        wide = words[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start + 1, start + len(wide) + 1, device=tensor.device)
        sums += torch.stack([wide.sum(), (wide * positions).sum()])
    return sums
