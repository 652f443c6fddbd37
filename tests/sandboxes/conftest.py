"""Fixtures: every property is tested on every back end that this machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from palaestra.sandboxes import Sandbox, SandboxBackend, SandboxSpec, check_backend, open_backend
from tests.conftest import require
from tests.sandboxes.remote_server import Server, running_server

BACKENDS = {"docker": "docker", "jail": "bwrap", "podman": "podman", "remote": "bwrap"}
"""Every back end that contains something, and the part of the machine that it needs."""
_reasons: dict[str, str | None] = {}


def require_backend(name: str) -> None:
    """Skip, or fail where its part is required, unless this machine can run such a box."""
    real = "jail" if name == "remote" else name
    if real not in _reasons:
        _reasons[real] = check_backend(real)
    require(BACKENDS[name], _reasons[real])


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server of jails, for all tests of this worker."""
    require_backend("remote")
    with running_server() as server:
        yield server


@pytest.fixture(params=list(BACKENDS))
def backend_name(request: pytest.FixtureRequest) -> str:
    """What `open_backend` takes: a name, or the address of a server of jails."""
    name = str(request.param)
    require_backend(name)
    if name == "remote":
        running: Server = request.getfixturevalue("server")
        return running.url
    return name


@pytest.fixture
def held_here(backend_name: str) -> None:
    """For tests that look at what this process holds for its boxes."""
    if backend_name.startswith("http"):
        pytest.skip("the server holds them: test_remote.py looks there")


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
