"""The looks from outside see what is there: each kind of leak is planted once, and found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palaestra.sandboxes import SandboxSpec, open_backend
from tests.sandboxes.conftest import require_backend
from tests.sandboxes.engines import containers, inspect
from tests.sandboxes.hostview import Ground, cgroups, eventually, marker, mounts, processes_with, traces_of

_needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can plant these")
pytestmark = pytest.mark.usefixtures("whole_machine")  # what one of them plants, another would find

_OWNER = """
import asyncio, sys
from palaestra.sandboxes import SandboxSpec, open_backend


async def main():
    backend = await open_backend(sys.argv[1])
    await backend.create(SandboxSpec())
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def _plant_cgroup(name: str) -> Callable[[], Path | None]:
    def plant() -> Path | None:
        parent = next((Path(path) for path in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if os.path.isdir(path)), None)
        if parent is None or not os.access(parent, os.W_OK):
            return None
        (parent / name).mkdir()
        return parent / name

    return plant


def _plant_mount(parent: str) -> Callable[[], Path | None]:
    def plant() -> Path | None:
        if not os.access(parent, os.W_OK):
            return None
        folder = Path(tempfile.mkdtemp(prefix="palaestra-planted-", dir=parent))
        subprocess.run(["mount", "-t", "tmpfs", "planted", folder], check=True)
        return folder

    return plant


@contextmanager
def _planted(plant: Callable[[], Path | None]) -> Iterator[Path]:
    path = plant()
    if path is None:
        pytest.skip("this machine has no such place")
    try:
        yield path
    finally:
        if os.path.ismount(path):
            subprocess.run(["umount", path], check=True)
        path.rmdir()


@_needs_root
@pytest.mark.parametrize(
    "plant",
    [
        _plant_cgroup(os.urandom(32).hex()),
        _plant_cgroup(f"libpod-{os.urandom(32).hex()}.scope"),
        _plant_mount("/var/lib"),
        _plant_mount("/run"),
        _plant_mount("/tmp"),
    ],
    ids=["docker cgroup", "podman cgroup", "mount of an engine", "mount in run", "mount elsewhere"],
)
def test_what_belongs_to_no_container_is_left(plant: Callable[[], Path | None]) -> None:
    ground = Ground()
    with _planted(plant) as path:
        assert str(path) in ground.left()
    assert str(path) not in ground.left()


@_needs_root
def test_a_cgroup_is_found_by_the_pid_in_its_name() -> None:
    with _planted(_plant_cgroup(f"palaestra-{os.getpid()}-planted")) as path:
        assert traces_of(os.getpid()) == [str(path)]


@pytest.mark.parametrize("name", ["docker", "podman"])
async def test_a_container_is_found_by_its_label_and_what_it_has_by_its_id(name: str) -> None:
    require_backend(name)
    ground = Ground()
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", _OWNER, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as owner:
        assert owner.stdout is not None
        try:
            assert owner.stdout.readline() == b"ready\n"
            (box,) = traces_of(owner.pid)
            assert any(box in place for place in [*cgroups(), *mounts()])  # the engine keeps something under its id
            assert await eventually(lambda: ground.left() == [])  # and none of it was left as long as it is listed
        finally:
            owner.kill()
    assert await eventually(lambda: traces_of(owner.pid) == [] and ground.left() == [])


async def test_what_docker_keeps_of_a_container_is_left_once_nobody_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("docker")
    ground = Ground()
    async with await open_backend("docker") as backend:
        await backend.create(SandboxSpec())
        (ours,) = [one for one in containers(owned=True) if one.owner_pid == os.getpid()]
        layer = inspect(ours)["GraphDriver"]["Data"]["MergedDir"]
        assert await eventually(lambda: ground.left() == [])
        with monkeypatch.context() as patch:
            patch.setattr("tests.sandboxes.hostview.containers", lambda **_: [])
            left = ground.left()
        assert layer in left, left
        assert any(ours.id in place for place in left)


async def test_a_sleeper_is_found_by_its_name() -> None:
    name = marker()
    assert processes_with(name) == []
    with subprocess.Popen(["sleep", name]) as process:
        assert await eventually(lambda: processes_with(name) == [process.pid])
        process.kill()
    assert await asyncio.to_thread(processes_with, name) == []
