"""Who works on a run folder: one process at a time, and the next one is told who it is.

Invariant: the lock dies with its owner, however that ends; what the file says is only for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import IO

from palaestra.errors import FULL, ConfigError, LedgerError

_SHOWN = 120


def take_lock(folder: Path) -> IO[str]:
    """The open lock of a run folder, made where it is missing; closing it lets go.

    Raises `LedgerError` with the owner's name when another process holds it, `ConfigError` when the folder cannot be
    written, and the `OSError` itself when the disk is full, which is no fault of the folder's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"cannot write the run folder {folder}: {error.strerror}; choose another place") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(_describe_me())
        lock.flush()
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "an unknown process"
        lock.close()
        raise LedgerError(f"{folder} is in use by {owner}; wait for it, or choose another run folder") from error
    except OSError as error:
        with contextlib.suppress(OSError):  # what could not be written is tried again at the close
            lock.close()
        if error.errno in FULL:
            raise
        raise ConfigError(f"cannot write the run folder {folder}: {error.strerror}; move it") from error
    return lock


def _describe_me() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_SHOWN]
    since = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} ({command})\n"
