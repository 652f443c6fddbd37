"""The one folder on the host that a browser has: its start script, and its profile where no cage holds that.

Invariant: the folder says whose it is before there is anything in it, so that `reap` clears it after its owner.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from palaestra.sandboxes._owner import is_dead, this_owner
from palaestra.sandboxes._subprocess import remove_folder

PREFIX = "palaestra-browser-"
_OWNER_FILE = ".owner"


def make_folder() -> Path:
    """A fresh folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    (folder / _OWNER_FILE).write_text(this_owner())
    return folder


def sweep() -> list[str]:
    """Remove the folders of dead owners and return their names."""
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or one that is just being made
            if is_dead((folder / _OWNER_FILE).read_text()):
                remove_folder(folder)
                removed.append(str(folder))
    return removed
