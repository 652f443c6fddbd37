"""What `palaestra doctor` and `palaestra sandbox` tell, and how they end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from palaestra.sandboxes import Capability, doctor
from palaestra.sandboxes._records import Record
from tests.sandboxes.conftest import require_backend

_CLI = "import sys; from palaestra.cli import main; sys.argv[0] = 'palaestra'; main()"
_NOTHING = {"PATH": "/nowhere", "DOCKER_HOST": "unix:///nowhere/docker", "CONTAINER_HOST": "unix:///nowhere/podman"}


def _run(
    *arguments: str, open_files: int = 0, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if open_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environ or {})}
    command = [sys.executable, "-P", "-c", _CLI, *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=env,
        preexec_fn=limit if open_files else None,
    )


@pytest.fixture
def odd_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A lease whose label is no markup, and longer than a screen is wide."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    label = "[/red] [bold]run[7] \x1b[31m \udc80 " + 100 * "x" + "\nend"
    Record.write(lease_id=f"box-{60 * 'y'}", backend="mine", label=label, handle="", lifetime_s=60.0)
    return label


def test_list_shows_every_label_as_it_is_and_whole(odd_label: str) -> None:
    done = _run("sandbox", "list")
    assert done.returncode == 0, done.stderr
    assert "[/red] [bold]run[7] \\x1b[31m \\udc80 " + 100 * "x" + "\\nend" in done.stdout
    assert f"box-{60 * 'y'}" in done.stdout
    rows = json.loads(_run("sandbox", "list", "--json").stdout)
    assert [row["label"] for row in rows] == [odd_label]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_bench_with_nothing_to_measure_tells_each_reason(flags: tuple[str, ...]) -> None:
    done = _run("sandbox", "bench", *flags, environ=_NOTHING)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(":")[1] for line in lines] == [" no jail", " no docker", " no podman"]
    assert "install the package 'bubblewrap'" in lines[0]
    assert done.stdout.split() == (["[]"] if flags else [])


def test_bench_with_too_few_descriptors_is_one_line_with_the_remedy() -> None:
    done = _run("sandbox", "bench", "--backend", "jail", open_files=40)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "palaestra: 40 open files are too few to measure with: raise `ulimit -n` to 512 or more"
    ]


def test_a_jail_without_a_free_descriptor_is_told_at_once() -> None:
    require_backend("jail")
    code = """
import asyncio
from palaestra.sandboxes import SandboxSpec, open_backend
async def main():
    async with await open_backend("jail") as backend:
        while True:
            await backend.create(SandboxSpec())
asyncio.run(main())
"""
    for open_files in (30, 31, 32, 33):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=env,
            preexec_fn=lambda n=open_files: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)),  # type: ignore[misc]
        )
        assert "IndexError" not in done.stderr, done.stderr
        assert "no answer within" not in done.stderr, done.stderr


def test_doctor_where_nothing_isolates_ends_with_two_and_the_remedies() -> None:
    done = _run("doctor", environ=_NOTHING)
    assert done.returncode == 2
    assert "install the package 'bubblewrap'" in done.stdout
    assert "nothing here contains code that nobody vouches for" in done.stdout
    told: dict[str, Any] = json.loads(_run("doctor", "--json", environ=_NOTHING).stdout)
    assert told["can_isolate"] is False
    assert all(each["ok"] or each["remedy"] for each in told["machine"])


def test_a_cache_folder_that_may_not_be_looked_at_is_a_finding() -> None:
    def forbidden() -> Path:
        raise PermissionError(13, "Permission denied", "/closed")

    finding = doctor._disk("userland cache", "XDG_CACHE_HOME", forbidden)
    assert not finding.is_ok
    assert "Permission denied: '/closed'" in finding.detail
    assert "set XDG_CACHE_HOME to a writable folder" in finding.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_an_ordinary_user_with_a_closed_cache_still_gets_the_whole_report(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    code = """
import os, sys
from palaestra.sandboxes import doctor
os.setgroups([]); os.setresgid(60411, 60411, 60411); os.setresuid(60411, 60411, 60411)
found = doctor._disk("userland cache", "XDG_CACHE_HOME", doctor.cache_folder)
print(found.is_ok, "|", found.detail, "|", found.remedy)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XDG_CACHE_HOME": str(closed / "in")}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.startswith("False | [Errno 13] Permission denied"), done.stderr


def test_whatever_cannot_be_looked_at_is_a_finding_with_a_remedy() -> None:
    def fail() -> doctor.Finding:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    finding = doctor._look("memory", fail)
    assert not finding.is_ok
    assert "/proc/meminfo" in finding.detail
    assert finding.remedy


def test_user_namespaces_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TRY_NAMESPACES", "import sys; sys.exit('cannot make one: Operation not permitted')")
    finding = doctor._user_namespaces(is_used=False)
    assert (finding.is_ok, finding.detail) == (False, "cannot make one: Operation not permitted")
    assert "sysctl" in finding.remedy
    assert "seccomp=unconfined" in finding.remedy
    assert doctor._user_namespaces(is_used=True).is_ok


def test_the_root_of_a_user_namespace_is_told_what_helps() -> None:
    code = "from palaestra.sandboxes.doctor import _user_namespaces; print(_user_namespaces(False))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"this machine gives no namespaces: {done.stderr.strip()}")
    assert "is_ok=False" in done.stdout, done.stderr
    assert "run as an ordinary user" in done.stdout


@pytest.mark.parametrize(
    ("mounts", "line", "names"),
    [
        (
            "memory/",
            "4:cpu,memory:/job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        ("", "0::/job/step", ("memory.max", "memory.current", "inactive_file")),
    ],
)
def test_memory_is_what_the_own_cgroup_and_those_above_it_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, line: str, names: tuple[str, str, str]
) -> None:
    limits = {"job/step": str(900 << 20), "job": str(400 << 20), "": "max"}
    for path, limit in limits.items():
        folder = tmp_path / f"{mounts}{path}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{300 << 20}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {50 << 20}\n")
    original = Path.read_text

    def read_text(path: Path) -> str:
        return f"{line}\n" if str(path) == "/proc/self/cgroup" else original(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(doctor, "_CGROUP_MOUNT", tmp_path)
    assert doctor._cgroup_free_mb() == 150
    finding = doctor._memory()
    assert not finding.is_ok
    assert finding.detail == "150 MB left of what this process's cgroup may use"
    assert finding.remedy


def test_an_unlimited_number_of_open_files_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"hard": resource.RLIM_INFINITY, "soft": resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (both["soft"], both["hard"]))
    assert doctor._open_files().is_ok
    both["soft"] = 64
    assert doctor._open_files().remedy == "ulimit -n 65536"
    both["hard"] = 100
    assert "hard limit, which is 100" in doctor._open_files().remedy


def test_whatever_a_back_end_lacks_has_a_remedy() -> None:
    backends = {"jail": frozenset({Capability.DISK}), "docker": frozenset({Capability.FILE_LOCKS})}
    for name in backends:
        for capability in Capability:
            assert doctor.remedy_for(name, capability, backends)
    assert doctor.remedy_for("jail", Capability.FILE_LOCKS, backends) == "use docker where it is needed"
    assert "delegated cgroup" in doctor.remedy_for("jail", Capability.MEMORY, backends)
