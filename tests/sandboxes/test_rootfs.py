"""The userland's folder: where it is, who can read it, what is left of old ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from palaestra.errors import ConfigError, SandboxError
from palaestra.sandboxes import SandboxSpec, _rootfs, open_backend
from palaestra.sandboxes._rootfs import Rootfs, cache_folder, ensure_rootfs
from tests.sandboxes.conftest import require_backend

_as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's jails have another user, and only root mounts")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own that every user can reach, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="cache-of-a-test-"))
    folder.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder
    shutil.rmtree(folder)


def _pretend_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rootfs, "_build", lambda _, target, __: target.mkdir())


def _tree(cache: Path, name: str, *, age_s: float) -> Path:
    path = cache / "palaestra/rootfs" / name
    (path / "usr").mkdir(parents=True)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(ConfigError, match="set HOME or XDG_CACHE_HOME"):
        cache_folder()


@_as_root
def test_a_jail_starts_from_a_userland_that_was_built_under_a_closed_umask(cache: Path) -> None:
    require_backend("jail")
    code = """
import os
os.umask(0o077)
from palaestra.sandboxes import check_backend
print(check_backend("jail"))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XDG_CACHE_HOME": str(cache / "new")}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.stdout == "None\n", done.stdout + done.stderr
    for path in (cache / "new").rglob("*"):
        if not path.is_symlink() and path.suffix != ".lock":
            assert path.stat().st_mode & 0o7777 in (0o755, 0o644), path
    for name in ("new", "new/palaestra", "new/palaestra/rootfs"):
        assert (cache / name).stat().st_mode & 0o7777 == 0o755


@_as_root
def test_a_full_disk_is_told_once_with_the_remedy_and_leaves_nothing(cache: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "palaestra-test", str(cache)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        with pytest.raises(
            ConfigError, match=r"No space left on device.*; free 100 MB there, or set XDG_CACHE"
        ) as caught:
            ensure_rootfs()
        assert len(str(caught.value)) < 500
        assert [path.name for path in (cache / "palaestra/rootfs").iterdir()] == ["build.lock"]
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_builder_removes_what_a_killed_one_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_to_build(monkeypatch)
    digest = ensure_rootfs().digest
    (cache / "palaestra/rootfs" / digest).rmdir()
    ours = _tree(cache, f".{digest}-abc", age_s=0)
    theirs = _tree(cache, f".{16 * 'a'}-abc", age_s=0)
    stale = _tree(cache, f".{16 * 'b'}-abc", age_s=7200)
    ensure_rootfs()
    assert [path.exists() for path in (ours, theirs, stale)] == [False, True, False]


def test_a_builder_removes_trees_that_nobody_holds_or_asks_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_to_build(monkeypatch)
    day_s = 86_400.0
    ages = {"a": 2 * day_s, "b": 0.5 * day_s, "c": 2 * day_s}
    old, recent, held = (_tree(cache, 16 * letter, age_s=age_s) for letter, age_s in ages.items())
    (old.parent / f"{16 * 'a'}.lock").touch()
    other = _tree(cache, "something-else", age_s=2 * day_s)
    fd = Rootfs(held, held.name).hold()
    try:
        rootfs = ensure_rootfs()
        assert [path.exists() for path in (old, recent, held, other)] == [False, True, True, True]
        assert sorted(path.name for path in old.parent.iterdir()) == sorted(
            [recent.name, held.name, rootfs.digest, other.name, "build.lock"]
        )
    finally:
        os.close(fd)
    rootfs.path.rmdir()
    ensure_rootfs()
    assert not held.exists(), "it was let go"
    with pytest.raises(SandboxError, match="userland has gone"):
        Rootfs(held, held.name).hold()


def test_a_tree_that_is_asked_for_is_not_old(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_to_build(monkeypatch)
    rootfs = ensure_rootfs()
    os.utime(rootfs.path, (0, 0))
    ensure_rootfs()
    assert time.time() - rootfs.path.stat().st_mtime < 60


async def test_a_jail_holds_its_userland_and_lets_it_go(monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("jail")
    removed: list[bool] = []
    rootfs = ensure_rootfs()

    def rename(path: Path, _: Path) -> Path:
        removed.append(path == rootfs.path)
        raise OSError("not really")

    monkeypatch.setattr(Path, "rename", rename)
    backend = await open_backend("jail")
    await backend.create(SandboxSpec())
    _rootfs._remove_unheld(rootfs.path)
    assert removed == []
    await backend.aclose()
