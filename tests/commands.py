"""The `palaestra` command as a user runs it: in a process of its own, with what it said and its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PALAESTRA = Path(sys.executable).with_name("palaestra")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with nothing to read from."""
    return subprocess.run(
        [PALAESTRA, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The user's mistake, told in one line that has these words."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("palaestra: ")
    for word in words:
        assert word in lines[0]
