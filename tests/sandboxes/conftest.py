"""Fixtures: every property is tested on every back end that this machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from palaestra.sandboxes import Sandbox, SandboxBackend, SandboxSpec, check_backend, open_backend
from tests.conftest import require
from tests.sandboxes.remote_server import Server, running_server

_PARTS = {"jail": "bwrap", "docker": "docker", "remote": "bwrap"}
_reasons: dict[str, str | None] = {}


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server of jails, for all tests of this worker."""
    require(_PARTS["remote"], check_once("jail"))
    with running_server() as server:
        yield server


@pytest.fixture(params=sorted(_PARTS))
def backend_name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name == "remote":
        running: Server = request.getfixturevalue("server")
        return running.url
    require(_PARTS[name], check_once(name))
    return name


@pytest.fixture
def held_here(backend_name: str) -> None:
    """For tests that look at what this process holds for its boxes."""
    if backend_name.startswith("http"):
        pytest.skip("the server holds them: test_remote.py looks there")


def check_once(name: str) -> str | None:
    """See `check_backend`, asked once for a session."""
    if name not in _reasons:
        _reasons[name] = check_backend(name)
    return _reasons[name]


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
