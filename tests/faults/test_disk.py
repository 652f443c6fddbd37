"""A full disk, and a run folder that cannot be written: one line that says what to do, and nothing lost afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tests.faults.jobs import Ended, Job, check_plays, check_whole, last_step

_SIZE_MB = 16
_HALF = 200 << 10
"""Room for half a checkpoint."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own at the run folder's place."""
    place = tmp_path / "run"
    place.mkdir()
    require("mount", _run("mount", "-t", "tmpfs", "-o", f"size={_SIZE_MB}m", "none", str(place)) or None)
    yield place
    _run("umount", "--lazy", str(place))


@pytest.fixture
def fragile_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk whose file system turns read-only on demand, as a kernel does that with one that fails."""
    place, image = tmp_path / "run", tmp_path / "image"
    place.mkdir()
    image.write_bytes(b"")
    os.truncate(image, _SIZE_MB << 20)
    made = _run("mkfs.ext4", "-q", str(image)) or _run("mount", "-o", "loop", str(image), str(place))
    require("mount", made or None)
    yield place
    _run("umount", "--lazy", str(place))


def _run(*command: str) -> str:
    """Run a command; what it complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def fill(disk: Path, *, left: int = 0) -> None:
    """Leave so many bytes free and no more."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - left)


def run_into_full_disk(job: Job, disk: Path, gate: str, *, left: int) -> Ended:
    job.paths.gate.write_text(gate)
    job.paths.open.unlink(missing_ok=True)
    with job.start() as running:
        running.until_told(f"gate: {gate}")
        fill(disk, left=left)
        job.paths.open.touch()
        ended = running.wait()
    (disk / "filler").unlink()
    job.paths.gate.unlink()
    return ended


def test_a_full_disk_is_told_in_one_line_and_nothing_is_lost(job: Job, disk: Path) -> None:
    reached = []
    # the ledger, a checkpoint of which nothing or a half finds room, the model
    for gate, left in (("generate", 0), ("save", 0), ("save", _HALF), ("export", 0)):
        ended = run_into_full_disk(job, disk, gate, left=left)
        assert ended.code == 1, ended.text
        assert list(job.run.glob("checkpoints/*.partial*")) == []
        line = ended.lines[-1]
        assert "free" in line
        assert "run the same command again" in line
        assert not any("Traceback" in each for each in ended.lines)
        reached.append(last_step(job.run))
    assert reached[0] <= 1
    assert 1 <= reached[1] <= reached[2] < 3
    assert reached[3] == 3
    assert sorted(path.name for path in job.run.glob("checkpoints/*"))[-1] == "version-00000003"
    assert (job.run / "checkpoints/version-00000003/learner.pt").stat().st_size > 1.5 * _HALF
    ended = job.finish()
    assert ended.code == 0, ended.text
    check_whole(job.run, steps=3)
    check_plays(job.run)


def test_a_disk_that_is_full_or_read_only_at_the_start_is_told_before_anything_starts(job: Job, disk: Path) -> None:
    fill(disk)
    ended = job.finish()
    assert (ended.code, len(ended.lines)) == (1, 1), ended.text
    assert "the disk is full: free space and run the same command again" in ended.lines[0]
    (disk / "filler").unlink()
    assert _run("mount", "-o", "remount,ro", str(disk)) == ""
    ended = job.finish()
    assert (ended.code, len(ended.lines)) == (2, 1), ended.text
    assert "cannot write the run folder" in ended.lines[0]
    assert "Read-only file system; choose another place" in ended.lines[0]


def test_a_file_system_that_turns_read_only_stops_the_run_and_it_goes_on_later(job: Job, fragile_disk: Path) -> None:
    job.paths.gate.write_text("save")
    with job.start() as running:
        running.until_told("gate: save")
        assert _run("mount", "-o", "remount,abort", str(fragile_disk)) == ""
        job.paths.open.touch()
        ended = running.wait()
    assert ended.code == 1, ended.text
    assert "Traceback" not in ended.text
    assert "Read-only file system" in ended.text or "the ledger cannot be read or written" in ended.text
    job.paths.gate.unlink()
    assert _run("umount", str(fragile_disk)) == ""
    # a copy of the disk: mount namespaces elsewhere on the machine may still hold the broken file system of the first
    copy = fragile_disk.with_name("copy")
    shutil.copyfile(fragile_disk.with_name("image"), copy)
    assert _run("mount", "-o", "loop", str(copy), str(fragile_disk)) == ""
    assert last_step(job.run) == 1, "what was recorded before is whole"
    ended = job.finish()
    assert ended.code == 0, ended.text
    check_whole(job.run, steps=3)
    check_plays(job.run)
