"""Sandbox back ends by name. A new one is one file that calls `register_backend`."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from palaestra.config import nearest
from palaestra.errors import ConfigError, PalaestraError, SandboxError, leaves
from palaestra.sandboxes._limits import SandboxSpec
from palaestra.sandboxes._managed import Admission, ManagedBackend, RawBackend
from palaestra.sandboxes._protocol import SandboxBackend

BackendFactory: TypeAlias = Callable[[], Awaitable[RawBackend]]

_UNSAFE = "subprocess"
_BUILT_IN = {
    "docker": ("palaestra.sandboxes._docker", "DockerBackend", Admission(max_boxes=64, max_creating=4)),
    "jail": ("palaestra.sandboxes._jail", "JailBackend", Admission()),
    "podman": ("palaestra.sandboxes._docker", "PodmanBackend", Admission(max_boxes=64, max_creating=2)),
    _UNSAFE: ("palaestra.sandboxes._subprocess", "SubprocessBackend", Admission(max_boxes=64)),
}

# the server admits; this side only keeps its connections few
_REMOTE = Admission(max_boxes=1 << 16, max_creating=64, max_running=128)


def _built_in(module: str, name: str) -> BackendFactory:
    async def make() -> RawBackend:
        backend: RawBackend = getattr(importlib.import_module(module), name)()
        return backend

    return make


_factories: dict[str, tuple[BackendFactory, Admission]] = {
    name: (_built_in(module, kind), admission) for name, (module, kind, admission) in _BUILT_IN.items()
}


def register_backend(name: str, factory: BackendFactory, admission: Admission | None = None) -> None:
    """Offer a back end under a new name; raises `ConfigError` when the name is taken.

    What the factory makes need only create and close; queue, list of leases and probe are put around it.
    """
    if name in _factories:
        raise ConfigError(f"there is already a sandbox back end called {name!r}")
    _factories[name] = factory, admission or Admission()


def backend_names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_factories))


async def open_backend(
    name: str = "jail", *, allow_unsafe: bool = False, admission: Admission | None = None, label: str = ""
) -> SandboxBackend:
    """The back end called `name`, to be closed by the caller; `label` is what `palaestra sandbox list` shows.

    Raises `ConfigError` for an unknown name, and for the one without isolation unless `allow_unsafe`.
    """
    if name.startswith(("http://", "https://")):
        from palaestra.sandboxes._remote import RemoteBackend

        return ManagedBackend(RemoteBackend(name), admission or _REMOTE, label)
    if name not in _factories:
        raise ConfigError(f"unknown sandbox back end {name!r}{nearest(name, list(_factories))}")
    if name == _UNSAFE and not allow_unsafe:
        raise ConfigError(
            f"the back end {name!r} isolates nothing: use 'jail' or 'docker', "
            "or open it with allow_unsafe=True for code that you wrote yourself"
        )
    factory, usual = _factories[name]
    return ManagedBackend(await factory(), admission or usual, label)


def check_backend(name: str) -> str | None:
    """None when this machine can really run a box of this kind, else one line with the reason and the remedy.

    It makes a box and runs code in it. Blocks for up to seconds; may be called with an event loop running. Raises
    what no back end should raise as it is.
    """
    # a thread of its own, because this one may be running a loop
    with ThreadPoolExecutor(1, thread_name_prefix=f"check {name}") as thread:
        error = thread.submit(lambda: asyncio.run(_prove(name))).exception()
    if error is None:
        return None
    found = list(leaves(error))
    for leaf in found:
        if not isinstance(leaf, PalaestraError | OSError):
            raise leaf
    return " ".join(str(found[0]).split()) or type(found[0]).__name__


async def _prove(name: str) -> None:
    backend = await open_backend(name, allow_unsafe=True)
    try:
        box = await backend.create(SandboxSpec())
        result = await box.run_python("print(6 * 7)")
        if result.stdout != b"42\n":
            raise SandboxError(f"a {name} box does not run Python: {result}")
    finally:
        await backend.aclose()
