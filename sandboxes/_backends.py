"""Sandbox back ends by name. A new one is one file that calls `register_backend`."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from palaestra.config import nearest
from palaestra.errors import ConfigError, PalaestraError, SandboxError
from palaestra.sandboxes._protocol import SandboxBackend, SandboxSpec

BackendFactory: TypeAlias = Callable[[], Awaitable[SandboxBackend]]


def _built_in(module: str, name: str) -> BackendFactory:
    async def make() -> SandboxBackend:
        backend: SandboxBackend = getattr(importlib.import_module(module), name)()
        return backend

    return make


_factories: dict[str, BackendFactory] = {
    "docker": _built_in("palaestra.sandboxes._docker", "DockerBackend"),
    "jail": _built_in("palaestra.sandboxes._jail", "JailBackend"),
}


def register_backend(name: str, factory: BackendFactory) -> None:
    """Offer a back end under a new name; raises `ConfigError` when the name is taken."""
    if name in _factories:
        raise ConfigError(f"there is already a sandbox back end called {name!r}")
    _factories[name] = factory


def backend_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_factories))


async def open_backend(name: str = "jail") -> SandboxBackend:
    """The back end called `name`, to be closed by the caller; raises `ConfigError` for an unknown name."""
    if name not in _factories:
        raise ConfigError(f"unknown sandbox back end {name!r}{nearest(name, list(_factories))}")
    return await _factories[name]()


def check_backend(name: str) -> str | None:
    """None when this machine can really run a box of this kind, else one line with the reason and the remedy.

    It makes a box and runs code in it. Blocks for up to seconds; may be called with an event loop running.
    """
    reasons: list[str] = []

    def prove() -> None:
        try:
            asyncio.run(_prove(name))
        except (PalaestraError, OSError) as error:
            reasons.append(" ".join(str(error).split()))

    # a thread of its own, because this one may be running a loop
    thread = threading.Thread(target=prove, name=f"check {name}")
    thread.start()
    thread.join()
    return reasons[0] if reasons else None


async def _prove(name: str) -> None:
    backend = await open_backend(name)
    try:
        box = await backend.create(SandboxSpec())
        result = await box.run_python("print(6 * 7)")
        if result.stdout != b"42\n":
            raise SandboxError(f"a {name} box does not run Python: {result}")
    finally:
        await backend.aclose()
