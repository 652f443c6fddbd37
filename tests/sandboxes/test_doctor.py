"""What `palaestra doctor` and `palaestra sandbox` tell, and how they end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palaestra.sandboxes._records import Record
from tests.sandboxes.conftest import require_backend

_CLI = "import sys; from palaestra.cli import main; sys.argv[0] = 'palaestra'; main()"
_NOTHING = {"PATH": "/nowhere", "DOCKER_HOST": "unix:///nowhere/docker", "CONTAINER_HOST": "unix:///nowhere/podman"}


def _run(*arguments: str, open_files: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if open_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environ}
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
    done = _run("sandbox", "bench", *flags, **_NOTHING)
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
    done = _run("doctor", **_NOTHING)
    assert done.returncode == 2
    assert "install the package 'bubblewrap'" in done.stdout
    assert "nothing here contains code that nobody vouches for" in done.stdout
    told: dict[str, Any] = json.loads(_run("doctor", "--json", **_NOTHING).stdout)
    assert told["can_isolate"] is False
    assert all(each["ok"] or each["remedy"] for each in told["machine"])
