"""Which split some content belongs to: decided by a hash of the content itself.

Invariant: the same content never stands in two splits, whatever the index or the seed.
"""

from __future__ import annotations

import hashlib
import random

from palaestra.types import Split

_TENTHS: tuple[Split, ...] = ("train",) * 8 + ("validation", "test")


def split_of(content: str) -> Split:
    """Train for eight tenths of all content, validation and test for one tenth each."""
    digest = hashlib.sha256(content.encode()).digest()
    return _TENTHS[int.from_bytes(digest[:4], "big") % len(_TENTHS)]


def rng_of(*parts: object) -> random.Random:
    """A generator that depends on nothing but the text of `parts`."""
    return random.Random("/".join(map(str, parts)))
