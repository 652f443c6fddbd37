"""What the reaper clears and what it leaves alone, and the command line around it.

Invariant: each test has a list of leases of its own, so that it never touches what others hold on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palaestra.sandboxes import _reaper, _records
from palaestra.sandboxes._owner import owner_of
from palaestra.sandboxes.leases import Record, boot_s, list_leases, reap
from tests.conformance.abuse.scene import sleeper
from tests.sandboxes.conftest import require_backend
from tests.sandboxes.hostview import Ground, eventually, marker, processes_with, traces_of
from tests.sandboxes.remote_server import start_python

pytestmark = pytest.mark.usefixtures("whole_machine")  # what one of them plants, another would find

_UNSAFE = "palaestra-unsafe-"
_PALAESTRA = Path(sys.executable).with_name("palaestra")
_OWNER = """
import asyncio, sys
from palaestra.sandboxes import SandboxSpec, open_backend


async def main():
    backend = await open_backend(sys.argv[1], allow_unsafe=True, label="of-a-test")
    box = await backend.create(SandboxSpec())
    print(box.id, flush=True)
    while True:  # each for ten seconds at most
        await box.exec(["sh", "-c", f"sleep {sys.argv[2]}"])

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def listed() -> Iterator[Path]:
    """A list of leases, and a temporary folder, of this test's own."""
    with tempfile.TemporaryDirectory(prefix="palaestra-reaper-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", name)
        patch.setattr(tempfile, "tempdir", name)
        patch.setenv("CONTAINER_HOST", os.environ.get("CONTAINER_HOST", "unix:///run/podman/podman.sock"))
        yield _records.lease_folder()


@contextmanager
def _owner(backend: str, name: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process with a box in which a sleeper runs, and the box's name."""
    with start_python(_OWNER, backend, name) as owner:
        assert owner.stdout is not None
        try:
            box = owner.stdout.readline().decode().strip()
            assert box
            deadline = time.monotonic() + 10
            while not processes_with(f"sleep\0{name}"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield owner, box
        finally:
            owner.kill()


def _dead_owner() -> str:
    """The owner text of a process that was there and is gone."""
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = owner_of(process.pid)
        process.kill()
    return owner


def _record(folder: Path, name: str, handle: str, *, owner: str | None = None, age_s: float = 0.0) -> None:
    """A lease of ten seconds, as if its owner had written it."""
    Record.write(lease_id=name, backend="jail", label="of-a-test", handle=handle, lifetime_s=10.0)
    path = folder / f"{name}.json"
    if owner is not None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "owner": owner}))
    os.utime(path, (boot_s() - age_s,) * 2)


@pytest.mark.parametrize("name", ["jail", "docker", "podman", "subprocess"])
async def test_boxes_of_a_living_owner_stay_and_those_of_a_dead_one_go(name: str) -> None:
    if name != "subprocess":
        require_backend(name)
    ground, asleep = Ground(), marker()
    with _owner(name, asleep) as (owner, box):
        assert [lease.id for lease in list_leases()] == [box]
        assert [one for one in reap() if box in one.what] == []
        assert [lease.id for lease in list_leases()] == [box]
        assert processes_with(f"sleep\0{asleep}")
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        (reaped,) = [one for one in reap() if one.what == f"{name} {box}"]
        assert (reaped.why, reaped.error) == ("its owner is gone", "")
        assert list_leases() == []
    if name == "subprocess":  # which isolates nothing: what it ran goes on, and is ours to end
        for pid in processes_with(f"sleep\0{asleep}"):
            os.kill(pid, signal.SIGKILL)
        assert list(Path(tempfile.gettempdir()).glob(f"{_UNSAFE}*")) == []
    assert await eventually(lambda: not processes_with(f"sleep\0{asleep}"))
    assert await eventually(lambda: traces_of(owner.pid) == [] and ground.left() == [])


async def test_a_jail_that_outlives_its_dead_owner_is_ended(listed: Path) -> None:
    with sleeper(marker()) as leaked:
        _record(listed, "jail-leaked", f"process {owner_of(leaked.pid)}", owner=_dead_owner())
        (reaped,) = [one for one in reap() if one.what == "jail jail-leaked"]
        assert reaped.error == ""
        assert leaked.wait(5) == -signal.SIGKILL
    assert list_leases() == []


async def test_another_process_with_the_number_of_a_box_is_not_killed(listed: Path) -> None:
    with sleeper(marker()) as stranger:
        boot, pid, began, namespace = owner_of(stranger.pid).split(":")
        earlier = f"{boot}:{pid}:{int(began) - 1}:{namespace}"
        _record(listed, "jail-earlier", f"process {earlier}", owner=_dead_owner())
        assert [one.error for one in reap() if one.what == "jail jail-earlier"] == [""]
        assert stranger.poll() is None


async def test_an_expired_lease_goes_though_its_owner_lives_and_one_within_its_grace_stays(listed: Path) -> None:
    with sleeper(marker()) as over, sleeper(marker()) as late:
        _record(listed, "jail-over", f"process {owner_of(over.pid)}", age_s=10.0 + _reaper._GRACE_S + 1.0)
        _record(listed, "jail-late", f"process {owner_of(late.pid)}", age_s=10.0 + _reaper._GRACE_S - 5.0)
        (reaped,) = [one for one in reap() if one.what.startswith("jail jail-")]
        assert (reaped.what, reaped.why, reaped.error) == ("jail jail-over", "its lifetime is over", "")
        assert over.wait(5) == -signal.SIGKILL
        assert late.poll() is None
        assert [lease.id for lease in list_leases()] == ["jail-late"]


async def test_what_cannot_be_ended_stays_listed_with_an_error(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{listed}/nobody-answers-here")
    _record(listed, "palaestra-1-stuck", "container docker", owner=_dead_owner())
    for _ in range(2):
        (reaped,) = [one for one in reap() if one.what == "jail palaestra-1-stuck"]
        assert reaped.error == "no docker daemon answers"
        assert [lease.id for lease in list_leases()] == ["palaestra-1-stuck"]
    done = _run("sandbox", "reap")
    assert done.returncode == 1
    assert "palaestra-1-stuck: its owner is gone; NOT cleared: no docker daemon answers" in done.stdout


def _reap_ours(make: Callable[[], Path], kind: str) -> None:
    """Reap what `make` makes, and see it told; again where a neighbour on this machine swept it a moment before us."""
    for _ in range(20):
        path = make()
        told = {one.what for one in reap()}
        assert not path.exists()
        if f"{kind} {path}" in told:
            return
    pytest.fail(f"no {kind} of ours was told of")


def _folder_of(owner: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=_UNSAFE))
    (folder / ".owner").write_text(owner)
    return folder


async def test_a_cgroup_and_a_folder_of_a_dead_owner_go_without_a_record() -> None:
    ours = _folder_of(owner_of(os.getpid()))
    _reap_ours(lambda: _folder_of(_dead_owner()), "folder")
    assert ours.exists()
    parent = Path("/sys/fs/cgroup/memory")
    if not os.access(parent, os.W_OK):
        return
    _, pid, start, namespace = owner_of(os.getpid()).split(":")
    orphan = parent / f"palaestra-4194305-{start}-{namespace}-00"  # above the kernel's largest pid
    living = parent / f"palaestra-{pid}-{start}-{namespace}-00"

    def make() -> Path:
        (orphan / "box0").mkdir(parents=True)
        return orphan

    try:
        living.mkdir()
        _reap_ours(make, "cgroup")
        assert living.exists()
    finally:
        for path in (orphan / "box0", orphan, living):
            if path.exists():
                path.rmdir()


async def test_a_record_that_was_cut_is_no_lease_and_goes_after_a_minute(listed: Path) -> None:
    fresh, old = listed / "fresh.json", listed / "old.json"
    for path in (fresh, old):
        path.write_text("")
    os.utime(old, (time.time() - 61,) * 2)
    assert list_leases() == []
    assert (fresh.exists(), old.exists()) == (True, False)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [_PALAESTRA, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )


def test_list_and_reap_on_the_command_line() -> None:
    require_backend("jail")
    assert json.loads(_run("sandbox", "list", "--json").stdout) == []
    with _owner("jail", marker()) as (owner, box):
        (row,) = json.loads(_run("sandbox", "list", "--json").stdout)
        assert (row["id"], row["backend"], row["label"], row["is_orphan"]) == (box, "jail", "of-a-test", False)
        assert 3500 < row["left_s"] <= 3600
        shown = _run("sandbox", "list")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert all(word in shown.stdout for word in (box, "of-a-test", str(owner.pid)))
        kept = _run("sandbox", "reap", "--json")
        assert kept.returncode == 0
        assert box not in kept.stdout
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        gone = _run("sandbox", "list")
        assert f"{owner.pid}, gone" in gone.stdout
        assert "1 without an owner: `palaestra sandbox reap` clears them" in gone.stdout
        reaped = _run("sandbox", "reap", "--json")
        assert reaped.returncode == 0
        expected = {"what": f"jail {box}", "why": "its owner is gone", "error": ""}
        assert expected in json.loads(reaped.stdout)
    assert json.loads(_run("sandbox", "list", "--json").stdout) == []


@pytest.mark.slow
def test_bench_on_the_command_line() -> None:
    require_backend("jail")
    done = _run("sandbox", "bench", "--backend", "jail", "--repeats", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert {figure["backend"] for figure in figures} == {"jail"}
    assert {figure["concurrency"] for figure in figures} == {1, 4, 16}
    assert {"first box of a process", "warm Python", "new Python", "create", "close"} <= {
        one["what"] for one in figures
    }
    assert all(min(figure["median_ms"], figure["p90_ms"], figure["per_s"]) > 0 for figure in figures)
    shown = _run("sandbox", "bench", "--backend", "subprocess", "--repeats", "2")
    assert shown.returncode == 0
    assert "warm Python" in shown.stdout


def test_a_backend_that_cannot_be_measured_is_one_line() -> None:
    done = _run("sandbox", "bench", "--backend", "jial", "--repeats", "2")
    assert done.returncode == 2
    assert done.stderr.strip() == "palaestra: unknown sandbox back end 'jial'; did you mean 'jail'?"
    assert _run("sandbox", "bench", "--repeats", "1").returncode == 2


@pytest.mark.slow
def test_doctor_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("jail")
    done = _run("doctor", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0
    assert said["can_isolate"] is True
    assert "host_files" in said["backends"]["jail"]
    assert {part["part"] for part in said["machine"]} >= {"user namespaces", "memory cgroups", "memory", "open files"}
    assert all(part["ok"] or part["remedy"] for part in said["machine"])
    # neither bubblewrap nor a daemon: each with its remedy, in one line
    with tempfile.TemporaryDirectory() as empty:
        monkeypatch.setenv("PATH", empty)
        for variable in ("DOCKER_HOST", "CONTAINER_HOST"):
            monkeypatch.setenv(variable, f"unix://{empty}/socket")
        without = _run("doctor", "--json")
        shown = _run("doctor")
    assert (without.returncode, shown.returncode) == (2, 2)
    said = json.loads(without.stdout)
    assert (said["can_isolate"], said["backends"]) == (False, {})
    assert set(said["unavailable"]) == {"jail", "docker", "podman"}
    assert all("\n" not in reason for reason in said["unavailable"].values())
    assert "bubblewrap" in said["unavailable"]["jail"]
    assert "DOCKER_HOST" in said["unavailable"]["docker"]
    assert "nothing here contains code that nobody vouches for" in shown.stdout
