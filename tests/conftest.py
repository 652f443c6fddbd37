"""Shared by all tests: what to do when a part of the machine is missing."""

from __future__ import annotations

import os

import pytest


def require(part: str, reason: str | None) -> None:
    """Skip with `reason` unless it is None; fail instead when PALAESTRA_REQUIRE (comma list) names `part`."""
    if reason is None:
        return
    if part in os.environ.get("PALAESTRA_REQUIRE", "").split(","):
        pytest.fail(f"{part} is required here, but: {reason}")
    pytest.skip(f"{part}: {reason}")
