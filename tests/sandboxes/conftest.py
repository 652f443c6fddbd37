"""Fixtures: every property is tested on every back end that this machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from palaestra.sandboxes import Sandbox, SandboxBackend, SandboxSpec, check_backend, open_backend
from tests.conftest import require

BACKENDS = {"docker": "docker", "jail": "bwrap", "podman": "podman"}
"""Every back end that contains something, and the part of the machine that it needs."""
_reasons: dict[str, str | None] = {}


def require_backend(name: str) -> None:
    """Skip, or fail where its part is required, unless this machine can run such a box."""
    if name not in _reasons:
        _reasons[name] = check_backend(name)
    require(BACKENDS[name], _reasons[name])


@pytest.fixture(params=list(BACKENDS))
def backend_name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    require_backend(name)
    return name


@pytest.fixture
async def backend(backend_name: str) -> AsyncIterator[SandboxBackend]:
    backend = await open_backend(backend_name)
    yield backend
    await backend.aclose()


@pytest.fixture
async def box(backend: SandboxBackend) -> AsyncIterator[Sandbox]:
    box = await backend.create(SandboxSpec())
    yield box
    await box.aclose()
