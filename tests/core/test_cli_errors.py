"""What the command says of errors that come from below."""

from __future__ import annotations

import os

import pytest

from palaestra.cli._main import _report
from palaestra.errors import FULL, WorkerError


@pytest.mark.parametrize("number", FULL)
def test_a_full_disk_is_told_wherever_it_struck(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    said = OSError(number, os.strerror(number), "/run/checkpoint")
    for error in (said, WorkerError(f"OSError: {said}"), ExceptionGroup("several", [said])):
        assert _report(error) == 1
        assert "the disk is full: free space and run the same command again (" in capsys.readouterr().err
