"""Checkpoints of the learner: whole folders with a manifest, the newest few kept.

Invariant: a checkpoint appears whole or not at all, and is used only when every byte is as it was written; one that
is not is set aside by name, and the one before is used. Only the owner of the run's lock removes anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from palaestra.records import sync_folder
from palaestra.trainer.learner import Learner

_MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"version-\d{8,}")
_PARTIAL = re.compile(r"version-\d{8,}\.partial(\.tmp)?")

OnDamage = Callable[[str], Awaitable[None]]
"""Hears of each checkpoint that cannot be used, in one line."""


class Checkpoints:
    """The checkpoints of one run, whose id is `run`, in `folder`."""

    def __init__(self, folder: Path, *, run: str = "", kept: int = 2) -> None:
        self._folder = folder
        self._run = run
        self._kept = kept

    @classmethod
    async def open(cls, folder: Path, *, run: str, kept: int) -> Checkpoints:
        """The checkpoints of a run whose lock is held; what saves that were left half-way wrote is removed."""
        checkpoints = cls(folder, run=run, kept=kept)
        await checkpoints.aclose()
        return checkpoints

    async def aclose(self) -> None:
        """Remove half-written checkpoints, once whoever wrote them is gone; idempotent."""
        await asyncio.to_thread(self._sweep)

    async def newest(self, upto: int, *, on_damage: OnDamage) -> Path | None:
        """The newest whole checkpoint of a version up to `upto`; damaged ones are renamed on the way to it."""
        for folder in reversed(self._found()):
            complaint: str | None = f"it is of step {version_of(folder)}, the ledger ends with {upto}"
            if version_of(folder) <= upto:
                complaint = await asyncio.to_thread(self._complaint, folder)
            if complaint is None:
                return folder
            await self.set_aside(folder, complaint, on_damage=on_damage)
        return None

    async def set_aside(self, folder: Path, complaint: str, *, on_damage: OnDamage) -> None:
        """Keep a checkpoint that cannot be used under another name, and say so."""
        aside = await asyncio.to_thread(_set_aside, folder)
        await on_damage(f"checkpoint {folder.name} cannot be used ({complaint}); it is kept as {aside.name}")

    async def save(self, learner: Learner) -> Path:
        """Save the learner's present version unless it is saved already; older checkpoints are thinned out."""
        target = self._folder / f"version-{learner.version:08d}"
        if not target.exists():
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            try:
                await learner.save(partial)
                await asyncio.to_thread(self._seal, partial, target, learner.version)
            finally:
                await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
        for old in self._found()[: -self._kept]:
            await asyncio.to_thread(shutil.rmtree, old)
        return target

    def find(self, upto: int) -> Path | None:
        """The newest whole checkpoint of a version up to `upto`; touches nothing."""
        early = (folder for folder in reversed(self._found()) if version_of(folder) <= upto)
        return next((folder for folder in early if self._complaint(folder) is None), None)

    @property
    def latest(self) -> int:
        """The newest version that was saved, 0 where there is none; unchecked."""
        return max(map(version_of, self._found()), default=0)

    def _found(self) -> list[Path]:
        """Names that we gave, the oldest first; copies that somebody made beside them are left alone."""
        return sorted(filter(lambda path: _NAME.fullmatch(path.name), self._folder.glob("version-*")), key=version_of)

    def _sweep(self) -> None:
        """A save that is left takes its folder along, not what the learner's process still writes for it."""
        for path in self._folder.glob("version-*.partial*"):
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)  # what stays costs room; a save that needs it says so

    def _seal(self, partial: Path, target: Path, version: int) -> None:
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        manifest = {"format": _FORMAT, "run": self._run, "version": version, "files": files}
        with (partial / _MANIFEST).open("w") as file:
            file.write(json.dumps(manifest, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        partial.rename(target)
        sync_folder(self._folder)
        sync_folder(self._folder.parent)  # the first checkpoint made the folder of them all

    def _complaint(self, folder: Path) -> str | None:
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            if manifest["format"] != _FORMAT:
                return f"it is of format {manifest['format']}, not {_FORMAT}"
            if manifest["run"] != self._run or manifest["version"] != version_of(folder):
                return "it belongs to another run or version"
            for name, described in manifest["files"].items():
                if _describe(folder / name) != described:
                    return f"{name} is not what was written"
        except FileNotFoundError as error:
            return f"{Path(str(error.filename)).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def _describe(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def version_of(folder: Path) -> int:
    """The version that a checkpoint's name tells."""
    return int(folder.name.partition("-")[2])


def _set_aside(folder: Path) -> Path:
    for count in range(1, 1000):
        aside = folder.with_name(f"{folder.name}.damaged-{count}")
        if not aside.exists():
            return folder.rename(aside)
    raise FileExistsError(f"too many damaged copies of {folder}")
