"""Shared by all tests: what to do when a part of the machine is missing."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# the same examples each time, however busy the machine is
settings.register_profile("palaestra", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("palaestra")


def require(part: str, reason: str | None) -> None:
    """Skip with `reason` unless it is None; fail instead when PALAESTRA_REQUIRE (comma list) names `part`."""
    if reason is None:
        return
    if part in os.environ.get("PALAESTRA_REQUIRE", "").split(","):
        pytest.fail(f"{part} is required here, but: {reason}")
    pytest.skip(f"{part}: {reason}")


@pytest.fixture
def whole_machine() -> Iterator[None]:
    """One test at a time on this machine, for those that look all over it, where others plant what is left over."""
    with Path(tempfile.gettempdir(), "palaestra-tests-whole-machine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
