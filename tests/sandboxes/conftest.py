"""Fixtures: every property is tested on every back end that this machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from palaestra.sandboxes import Sandbox, SandboxBackend, SandboxSpec, check_backend, open_backend
from tests.conftest import require

_PARTS = {"jail": "bwrap", "docker": "docker"}
_reasons: dict[str, str | None] = {}


@pytest.fixture(params=sorted(_PARTS))
def backend_name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in _reasons:
        _reasons[name] = check_backend(name)
    require(_PARTS[name], _reasons[name])
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
