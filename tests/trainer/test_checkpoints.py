"""Checkpoints: whole or not at all, and whatever is wrong with one, the one before is used and the owner told."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from palaestra.trainer.checkpoints import Checkpoints
from tests.toys import ToyLearner

Damage = Callable[[Path], object]


class Said:
    """Hears of damage."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def __call__(self, line: str) -> None:
        self.lines.append(line)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


async def save(folder: Path, *versions: int, run: str = "run") -> Checkpoints:
    checkpoints = Checkpoints(folder, run=run)
    learner = ToyLearner()
    for learner.version in versions:
        await checkpoints.save(learner)
    return checkpoints


def rewrite(folder: Path, **changes: object) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


DAMAGES: dict[str, Damage] = {
    "version is missing": lambda folder: (folder / "version").unlink(),
    "version is not what was written": lambda folder: (folder / "version").write_text("9"),
    "version is not what was written ": lambda folder: (folder / "version").write_text(""),
    "IsADirectoryError": lambda folder: replace_by_folder(folder / "version"),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "JSONDecodeError": lambda folder: (folder / "manifest.json").write_text("{"),
    "UnicodeDecodeError": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
    "TypeError": lambda folder: (folder / "manifest.json").write_text("[]"),
    "KeyError": lambda folder: (folder / "manifest.json").write_text("{}"),
    "AttributeError": lambda folder: rewrite(folder, files=[]),
    "it is of format 7, not 1": lambda folder: rewrite(folder, format=7),
    "it belongs to another run or version": lambda folder: rewrite(folder, run="another"),
    "it belongs to another run or version ": lambda folder: rewrite(folder, version=1),
}


@pytest.mark.parametrize("complaint", DAMAGES)
async def test_damaged_checkpoint_is_named_and_set_aside(tmp_path: Path, complaint: str) -> None:
    checkpoints = await save(tmp_path, 1, 2)
    DAMAGES[complaint](tmp_path / "version-00000002")
    said = Said()
    assert await checkpoints.newest(2, on_damage=said) == tmp_path / "version-00000001"
    assert len(said.lines) == 1
    assert said.lines[0].startswith(f"checkpoint version-00000002 cannot be used ({complaint.strip()}")
    assert said.lines[0].endswith("it is kept as version-00000002.damaged-1")
    assert (tmp_path / "version-00000002.damaged-1").is_dir()


async def test_checkpoint_beyond_the_ledger_is_set_aside(tmp_path: Path) -> None:
    checkpoints = await save(tmp_path, 1, 2)
    said = Said()
    assert await checkpoints.newest(1, on_damage=said) == tmp_path / "version-00000001"
    assert "it is of step 2, the ledger ends with 1" in said.lines[0]


async def test_second_damage_of_a_version_is_kept_beside_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints = await save(tmp_path, 2)
        (tmp_path / "version-00000002" / "version").unlink()
        assert await checkpoints.newest(2, on_damage=Said()) is None
    assert {path.name for path in tmp_path.iterdir()} == {"version-00000002.damaged-1", "version-00000002.damaged-2"}


async def test_half_written_checkpoint_is_no_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    checkpoints = await save(tmp_path, 1)
    (tmp_path / "version-00000002.partial").mkdir()
    (tmp_path / "version-00000002.partial" / "version").write_text("2")
    said = Said()
    assert await checkpoints.newest(2, on_damage=said) == tmp_path / "version-00000001"
    assert said.lines == []
    await save(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"version-00000001", "version-00000002"}


class LeavingLearner(ToyLearner):
    """Its process writes on after the save was called off, beside the place, as it does with all files."""

    async def save(self, folder: Path) -> None:
        try:
            raise asyncio.CancelledError
        finally:
            folder.with_name(f"{folder.name}.tmp").mkdir(parents=True)


async def test_what_a_save_that_was_left_wrote_goes_when_the_run_is_left_and_when_it_goes_on(tmp_path: Path) -> None:
    learner = LeavingLearner()
    learner.version = 7
    for is_left in (True, False):
        checkpoints = await save(tmp_path, 1)
        with pytest.raises(asyncio.CancelledError):
            await checkpoints.save(learner)
        (tmp_path / "version-00000009.partial").mkdir()
        (tmp_path / "version-00000001.partial-copy").mkdir(exist_ok=True)
        Checkpoints(tmp_path, run="run").find(9)
        assert (tmp_path / "version-00000007.partial.tmp").is_dir(), "who only reads removes nothing"
        await (checkpoints.aclose() if is_left else Checkpoints.open(tmp_path, run="run", kept=2))
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"version-00000001", "version-00000001.partial-copy"}, "a copy of somebody's is left alone"


async def test_copies_that_somebody_made_are_left_alone(tmp_path: Path) -> None:
    checkpoints = await save(tmp_path, 1)
    for name in ("version-00000004-copy", "version-", "version-new", "version-00000001.damaged-1"):
        (tmp_path / name).mkdir()
    said = Said()
    assert checkpoints.latest == 1
    assert await checkpoints.newest(9, on_damage=said) == checkpoints.find(9) == tmp_path / "version-00000001"
    assert said.lines == []
    await save(tmp_path, 2, 3)
    assert (tmp_path / "version-00000004-copy").is_dir()
    assert (tmp_path / "version-new").is_dir()


async def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_rename(path: Path, target: Path) -> Path:
        synced.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    await save(tmp_path / "run" / "checkpoints", 1)
    assert synced == ["manifest.json", "version-00000001.partial", "renamed", "checkpoints", "run"]
