"""Temporary folders with an owner, so that what a killed process left is found and removed.

Invariant: a folder is an orphan only when it is this user's and the owner that it names is dead; its own name says
whose it is until it has a file that tells the boot too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palaestra.errors import SandboxError
from palaestra.sandboxes._owner import is_dead, this_owner

_PREFIXES = ("palaestra-unsafe-", "palaestra-probe-", "palaestra-browser-")
_OWNER_FILE = ".owner"
_REMOVE_S = 30.0


def make_folder(kind: str) -> Path:
    """A new temporary folder of this process, of one of the kinds above; raises `SandboxError`, leaving nothing."""
    prefix = f"palaestra-{kind}-"
    assert prefix in _PREFIXES, "what is not listed is not found again"
    try:
        named = "-".join(this_owner().split(":")[1:])
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{named}-")).resolve()
        try:
            (folder / _OWNER_FILE).write_text(this_owner())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise SandboxError(f"cannot make a folder for a sandbox: {error}; free space, or set TMPDIR") from error
    return folder


@contextmanager
def owned_folder(kind: str) -> Iterator[Path]:
    """The same for the length of a block."""
    folder = make_folder(kind)
    try:
        yield folder
    finally:
        remove_folder(folder)


def orphans() -> list[Path]:
    """The folders of dead owners."""
    temporary = Path(tempfile.gettempdir())
    folders = [folder for prefix in _PREFIXES for folder in temporary.glob(f"{prefix}*")]
    return [folder for folder in folders if _is_orphan(folder)]


def _is_orphan(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # gone meanwhile
        if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
            return False
        try:
            return is_dead((folder / _OWNER_FILE).read_text())
        except FileNotFoundError:
            boot_id = this_owner().partition(":")[0]
            return not any(folder.iterdir()) and is_dead(":".join([boot_id, *folder.name.split("-")[2:5]]))
    return False


def remove_folder(folder: Path) -> None:
    """Remove a folder whatever is in it; raises `OSError` with the first reason.

    The programs can do what no recursion of ours can: any depth and mode.
    """
    try:
        subprocess.run(
            ["chmod", "-R", "u+rwX", "--", str(folder)], check=False, stderr=subprocess.DEVNULL, timeout=_REMOVE_S
        )
        removal = subprocess.run(
            ["rm", "-rf", "--", str(folder)], check=False, capture_output=True, timeout=_REMOVE_S, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{folder} could not be removed within {_REMOVE_S:g} s") from error
    if removal.returncode:
        reason = (removal.stderr.splitlines() or ["no reason told"])[0]
        raise OSError(f"{folder} could not be removed: {reason}")
