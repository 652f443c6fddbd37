"""Checkpoints of the learner: whole folders, written beside their place and renamed, the newest few kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from palaestra.trainer.learner import Learner

_KEPT = 2


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> Path | None:
        """The folder of the newest complete checkpoint."""
        found = self._found()
        return found[-1] if found else None

    async def save(self, learner: Learner) -> None:
        """Save the learner's present version unless it is saved already; older checkpoints are thinned out."""
        target = self._folder / f"version-{learner.version:08d}"
        if target.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        await learner.save(target)
        for old in self._found()[:-_KEPT]:
            shutil.rmtree(old)

    def _found(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("version-*") if path.suffix == "")
