"""The host's list of leases: one place, whole records, and what happens where they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palaestra.errors import ConfigError, PalaestraError, SandboxError
from palaestra.sandboxes import SandboxSpec, open_backend
from palaestra.sandboxes._folders import make_folder
from palaestra.sandboxes._owner import this_owner
from palaestra.sandboxes._reaper import reap
from palaestra.sandboxes._records import Record, boot_s, lease_folder, list_leases
from tests.sandboxes.conftest import require_backend
from tests.sandboxes.hostview import eventually, marker, processes_with


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "palaestra-test", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _write(lease_id: str = "box", **values: object) -> Record:
    lifetime_s = float(str(values.get("lifetime_s", 60.0)))
    return Record.write(lease_id=lease_id, backend="mine", label="run", handle="", lifetime_s=lifetime_s)


def test_the_list_is_in_one_place_whatever_the_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "session"))
    assert lease_folder() == tmp_path / f"palaestra-leases-{os.geteuid()}"
    monkeypatch.delenv("TMPDIR")
    assert lease_folder() == Path(f"/tmp/palaestra-leases-{os.geteuid()}")


def test_a_record_is_whole_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Path.write_text

    def write_text(path: Path, text: str) -> int:
        original(path, text[:10])
        seen.append(list_leases())
        return original(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    _write()
    assert seen == [[]]
    assert [path.name for path in lease_folder().iterdir()] == ["box.json"]


@pytest.mark.parametrize("days", [-1, 1])
def test_a_wall_clock_that_jumps_ends_no_lease(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    record = _write()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + days * 86_400)
    [lease] = list_leases()
    assert 0.0 <= boot_s() - lease.began_s < 60.0
    assert lease.lifetime_s - 60.0 < lease.left_s(boot_s()) <= lease.lifetime_s
    assert [each.what for each in reap() if lease.id in each.what] == []
    record.renew()
    assert list_leases()[0].began_s >= lease.began_s


def test_what_a_killed_writer_left_goes() -> None:
    partial = lease_folder() / "x.partial"
    partial.touch()
    list_leases()
    assert partial.exists()
    os.utime(partial, (time.time() - 100,) * 2)
    list_leases()
    assert not partial.exists()


@pytest.mark.parametrize("text", ["", "[]", "7", '{"owner": 3}', '{"owner": "x", "backend": "", "label": ""}'])
def test_a_file_that_is_no_record_is_no_lease(text: str) -> None:
    (lease_folder() / "x.json").write_text(text)
    assert list_leases() == []


def test_ids_of_other_back_ends_may_have_any_letters() -> None:
    record = _write("../a/b%c")
    assert [lease.id for lease in list_leases()] == ["../a/b%c"]
    record.remove()
    assert list(lease_folder().iterdir()) == []


async def test_boxes_of_two_back_ends_in_one_process_are_two_leases() -> None:
    async with (
        await open_backend("subprocess", allow_unsafe=True) as one,
        await open_backend("subprocess", allow_unsafe=True) as other,
    ):
        boxes = [await one.create(SandboxSpec()), await other.create(SandboxSpec())]
        assert {lease.id for lease in list_leases()} == {box.id for box in boxes}
        await boxes[0].aclose()
        assert [lease.id for lease in list_leases()] == [boxes[1].id]


async def test_two_jail_back_ends_in_one_process_do_not_share_an_id() -> None:
    require_backend("jail")
    async with await open_backend("jail") as one, await open_backend("jail") as other:
        boxes = [await one.create(SandboxSpec()), await other.create(SandboxSpec())]
        assert len({box.id for box in boxes}) == 2
        assert all(box.id.startswith(f"jail-{os.getpid()}-") for box in boxes)


async def test_a_full_disk_is_ours_and_leaves_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(small_disk))
    folder = lease_folder()
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    async with await open_backend("subprocess", allow_unsafe=True) as backend:
        for _ in range(2):
            with pytest.raises(SandboxError, match=r"No space left on device; free space there, or set TMPDIR"):
                await backend.create(SandboxSpec())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_record_is_told_with_the_remedy(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    folder = lease_folder()
    monkeypatch.setattr(Path, "replace", refuse)
    kind: type[PalaestraError] = SandboxError if code == errno.ENOSPC else ConfigError
    with pytest.raises(kind, match=rf"cannot keep the list of sandboxes in .*{os.strerror(code)}; .*set TMPDIR"):
        _write()
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_gone_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="No such file or directory; set TMPDIR"):
        _write()


def test_a_record_that_was_reaped_may_still_be_renewed_and_removed() -> None:
    record = _write()
    (lease_folder() / "box.json").unlink()
    record.renew()
    record.remove()


def _dead_owner() -> str:
    boot, _, start, namespace = this_owner().split(":")
    return f"{boot}:4194304:{start}:{namespace}"  # above the kernel's largest pid


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_reap_removes_folders_of_the_dead_and_no_others(temporary: Path) -> None:
    orphan, living = make_folder("unsafe"), make_folder("probe")
    (orphan / ".owner").write_text(_dead_owner())
    nameless = "-".join(_dead_owner().split(":")[1:])  # its maker died before it could write into it
    other, aged = temporary / "palaestra-unsafe-mine", temporary / f"palaestra-probe-{nameless}-x"
    for folder in (other, aged, temporary / f"palaestra-unsafe-{living.name.partition('probe-')[2]}"):
        folder.mkdir()
    (other / "file").touch()
    (temporary / "palaestra-unsafe-link").symlink_to(orphan)
    told = {each.what for each in reap() if each.what.startswith("folder")}
    assert told == {f"folder {orphan}", f"folder {aged}"}
    assert not orphan.exists()
    assert not aged.exists()
    assert living.exists()
    assert other.exists()


@pytest.mark.parametrize("broken", ["fails", "hangs"])
def test_a_folder_that_does_not_go_is_reported_and_the_next_ones_go(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folders = [make_folder("unsafe") for _ in range(3)]
    for folder in folders:
        (folder / ".owner").write_text(_dead_owner())
    original = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[-1] == str(folders[1]) and command[0] == "rm":
            if broken == "hangs":
                raise subprocess.TimeoutExpired(command, 1)
            command = ["rm", "-rf", "--", "/proc/self/stat"]
        return original(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    for number, folder in enumerate(folders[:2]):
        values = {"backend": "subprocess", "owner": _dead_owner(), "label": "", "handle": f"folder {folder}"}
        (lease_folder() / f"x{number}.json").write_text(json.dumps({**values, "lifetime_s": 60.0}))
    by_name = {each.what: each.error for each in reap()}
    assert by_name["subprocess x0"] == ""
    assert "could not be removed" in by_name["subprocess x1"]
    assert "could not be removed" in by_name[f"folder {folders[1]}"]
    assert by_name[f"folder {folders[2]}"] == ""
    assert [folder.exists() for folder in folders] == [False, True, False]
    assert [lease.id for lease in list_leases()] == ["x1"], "it stays on the list"


def test_a_handle_that_is_none_is_reported() -> None:
    values = {"backend": "mine", "owner": _dead_owner(), "label": "", "handle": "process what", "lifetime_s": 60.0}
    (lease_folder() / "x.json").write_text(json.dumps(values))
    assert [each.error for each in reap() if each.what == "mine x"] != [""]


async def test_a_probe_that_is_killed_leaves_nothing_that_reap_does_not_clear(temporary: Path) -> None:
    code = """
import sys
from palaestra.sandboxes._probe import _host_targets, _sleeper
with _host_targets(), _sleeper(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""
    name = marker()
    env = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", code, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (folder,) = temporary.glob("palaestra-probe-*")
        assert await eventually(lambda: len(processes_with(name)) == 2)
        process.kill()
    assert await eventually(lambda: not processes_with(name))
    reap()
    assert not folder.exists()
