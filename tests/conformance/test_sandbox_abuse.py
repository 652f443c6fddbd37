"""The abuse suite: every numbered attempt on every back end of this machine, each with its positive control.

Invariants: a back end contains what its capabilities claim, and not what they do not; after each attempt the
next box is clean, a box that was open all the while still works, and closing takes less than two seconds. Where
PALAESTRA_REQUIRE names a back end's part, it must contain everything but what `_OPEN` lists.

Does not cover: attempts 63 to 73, on browsers, which are in tests/conformance/test_browser_abuse.py.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from palaestra.errors import ConfigError
from palaestra.sandboxes import Capability, Sandbox, SandboxBackend, SandboxSpec, open_backend
from tests.conformance.abuse import (
    amounts,
    archives,
    endings,
    filesystem,
    grading,
    hosts,
    kernel,
    lifecycle,
    names,
    network,
    output,
    reach,
)
from tests.conformance.abuse.scene import ATTEMPTS, Attempt, Scene
from tests.sandboxes.conftest import BACKENDS, require_backend
from tests.sandboxes.hostview import processes_with
from tests.sandboxes.remote_server import running_server

_THEMES = (filesystem, names, archives, amounts, endings, reach, output, network, kernel, grading, lifecycle, hosts)
ALL = [ATTEMPTS[number] for number in sorted(ATTEMPTS)]
_WHOLE_MACHINE = (58, 59, 60)
"""These look at the whole machine, where other tests plant what is left over."""


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest) -> None:
    attempt = getattr(request.node, "callspec", None) and request.node.callspec.params.get("attempt")
    if attempt is not None and attempt.number in _WHOLE_MACHINE:
        request.getfixturevalue("whole_machine")


_OPEN: dict[str, tuple[int, ...]] = {"jail": (57,), "podman": (6,), "remote": (57,)}
"""What a back end does not contain even where the machine has all it needs; the remote one serves jails."""
_LOOK = "import os; print([os.listdir(place) for place in ('/workspace', '/tmp', '/dev/shm')])"


class Yard:
    """A back end, a box that is ready and was seen to be clean, and one that is open all the while."""

    def __init__(
        self, backend: SandboxBackend, holder_pid: int, capabilities: frozenset[Capability], bystander: Sandbox
    ) -> None:
        self.backend = backend
        self.holder_pid = holder_pid
        """The process that holds the boxes: this one, or a server."""
        self.capabilities = capabilities
        self._bystander = bystander
        self._ready: Sandbox | None = None

    async def take(self) -> Sandbox:
        """A box that nothing has run in but a look around."""
        await self.look()
        assert self._ready is not None
        box, self._ready = self._ready, None
        return box

    async def look(self) -> None:
        """The next box is clean and works, and so does the bystander."""
        if self._ready is None:
            self._ready = await self.backend.create(SandboxSpec())
            assert (await self._ready.run_python(_LOOK)).stdout == b"[[], [], []]\n"
        assert (await self._bystander.run_python("print('alive')")).stdout == b"alive\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def yard(request: pytest.FixtureRequest) -> AsyncIterator[Yard]:
    require_backend(request.param)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server()) if request.param == "remote" else None
        backend = await open_backend(server.url if server else request.param)
        try:
            holder_pid = server.process.pid if server else os.getpid()
            yield Yard(backend, holder_pid, await backend.capabilities(), await backend.create(SandboxSpec()))
        finally:
            await backend.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def unsafe() -> AsyncIterator[tuple[SandboxBackend, frozenset[Capability]]]:
    backend = await open_backend("subprocess", allow_unsafe=True)
    try:
        yield backend, await backend.capabilities()
    finally:
        await backend.aclose()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the host that everybody can reach and write to: only isolation keeps a box out."""
    with tempfile.TemporaryDirectory(prefix="palaestra-abuse-", ignore_cleanup_errors=True) as name:
        path = Path(name).resolve()
        path.chmod(0o777)
        yield path


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("attempt", ALL, ids=str)
@pytest.mark.parametrize("yard", BACKENDS, indirect=True)
async def test_abuse(yard: Yard, attempt: Attempt, folder: Path) -> None:
    if attempt.backends and yard.backend.name not in attempt.backends:
        pytest.skip(f"{yard.backend.name} has nothing that this attacks, or its own test in tests/sandboxes")
    scene = Scene(yard.backend, yard.capabilities, await yard.take(), folder, yard.holder_pid)
    try:
        is_contained = await attempt.attack(scene)
    finally:
        await scene.aclose()
    await yard.look()
    assert processes_with(scene.marker) == []
    is_claimed = attempt.capability is None or attempt.capability in yard.capabilities
    assert is_contained == is_claimed, f"contained: {is_contained}, claimed by {attempt.capability}: {is_claimed}"
    if BACKENDS[yard.backend.name] in os.environ.get("PALAESTRA_REQUIRE", "").split(","):
        assert is_contained == (attempt.number not in _OPEN.get(yard.backend.name, ()))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("attempt", ALL, ids=str)
async def test_positive_control(
    attempt: Attempt, unsafe: tuple[SandboxBackend, frozenset[Capability]], folder: Path
) -> None:
    backend, capabilities = unsafe
    scene = Scene(backend, capabilities, await backend.create(SandboxSpec()), folder)
    try:
        if attempt.control is not None:
            await attempt.control(scene)
        else:
            assert not await attempt.attack(scene)
            assert attempt.capability not in capabilities
    finally:
        await scene.aclose()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("attempt", [one for one in ALL if one.capability is None], ids=str)
async def test_what_every_backend_must_contain_is_contained_without_isolation_too(
    attempt: Attempt, unsafe: tuple[SandboxBackend, frozenset[Capability]], folder: Path
) -> None:
    backend, capabilities = unsafe
    if attempt.backends and backend.name not in attempt.backends:
        pytest.skip(f"{backend.name} has nothing that this attacks")
    scene = Scene(backend, capabilities, await backend.create(SandboxSpec()), folder)
    try:
        assert await attempt.attack(scene)
    finally:
        await scene.aclose()
    assert processes_with(scene.marker) == []


def test_every_number_is_there() -> None:
    assert sorted(ATTEMPTS) == list(range(1, 63))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("yard", BACKENDS, indirect=True)
async def test_what_is_not_contained_is_refused_where_it_is_needed(yard: Yard) -> None:
    await _refuses_what_it_lacks(yard.backend, yard.capabilities)


@pytest.mark.asyncio(loop_scope="module")
async def test_without_isolation_every_need_of_it_is_refused(
    unsafe: tuple[SandboxBackend, frozenset[Capability]],
) -> None:
    backend, capabilities = unsafe
    assert not Capability.isolating() & capabilities
    await _refuses_what_it_lacks(backend, capabilities)


async def _refuses_what_it_lacks(backend: SandboxBackend, capabilities: frozenset[Capability]) -> None:
    missing = set(Capability) - capabilities
    for capability in missing:
        with pytest.raises(ConfigError, match=f"does not provide {capability}"):
            await backend.create(SandboxSpec(needs=frozenset({capability})))
    if missing:
        with pytest.raises(ConfigError, match="does not provide"):
            await backend.create(SandboxSpec(needs=frozenset(Capability)))
    await (await backend.create(SandboxSpec(needs=capabilities))).aclose()
