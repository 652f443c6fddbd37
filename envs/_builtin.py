"""The environments that come with Palaestra: what the `environments.toml` of each package beside this file lists.

A table is named after a class of its package and gives its id, family and one line about it. The file is TOML, so
that `palaestra_gymnasium.py`, which must not import Palaestra, reads the same one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from palaestra.envs._registry import register


def register_all() -> None:
    """Register every environment of ours; idempotent."""
    for manifest in sorted(Path(__file__).parent.glob("*/environments.toml")):
        for name, entry in tomllib.loads(manifest.read_text(encoding="utf-8")).items():
            register(
                entry["id"],
                f"palaestra.envs.{manifest.parent.name}:{name}",
                family=entry["family"],
                summary=entry["summary"],
            )
