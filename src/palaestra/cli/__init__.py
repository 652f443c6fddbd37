"""The command line: `palaestra envs | eval | train | size | quickstart | doctor | replay | sandbox`.

Invariant: a user's mistake or a missing part ends in one line on standard error and exit code 2, a failure of
ours in one line and 1, an interrupt in 130; never in a traceback alone. Heavy imports wait for their command.
"""

from __future__ import annotations

from palaestra.cli._main import main

__all__ = ["main"]
