"""Three hundred leases with kills at random leave nothing: the benchmark's soak, in small; and it sees what is left.

Does not cover: Podman, which the soak takes when it is asked to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.sandboxes.conftest import require_backend
from tests.sandboxes.pages import require_chromium

pytestmark = pytest.mark.usefixtures("whole_machine")  # what one of them plants, another would find

_SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
_KINDS = {"processes", "containers", "mounts", "cgroups", "records", "temporary folders"}
_BOX_FATES = """
answers; leaves daemons; runs out of time; runs out of memory; kills all it can; is forgotten; is killed by the host;
is never used
"""
_BROWSER_FATES = "answers; loops; is forgotten; is killed by the host"


def _soak(*options: str, timeout_s: float) -> tuple[dict[str, Any], int]:
    """The report, and the exit code."""
    command = [sys.executable, "-P", str(_SOAK), "--json", *options]
    with tempfile.TemporaryDirectory(prefix="soak-errors-") as folder, Path(folder, "stderr").open("w+") as errors:
        with Path(folder, "stdout").open("w+") as output:  # files, which a leaked process may keep open
            done = subprocess.run(command, stdout=output, stderr=errors, timeout=timeout_s, check=False)
            output.seek(0)
            said = output.read()
        errors.seek(0)
        assert said, errors.read()
    report: dict[str, Any] = json.loads(said)
    return report, done.returncode


def _fates(name: str, text: str) -> set[str]:
    return {f"{name}: {fate.strip()}" for fate in text.split(";")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_hundred_leases_with_kills_leave_nothing() -> None:
    require_backend("jail")
    require_backend("docker")
    require_chromium()
    report, code = _soak("--leases", "300", "--concurrency", "16", "--seed", "3", timeout_s=280)
    assert report["wrong"] == []
    assert set(report["left"]) == _KINDS
    assert not any(report["left"].values()), report["left"]
    assert report["not_reaped"] == []
    assert code == 0
    assert set(report["leases"]) == {"jail", "docker", "browser"}
    assert sum(report["leases"].values()) >= 300
    assert report["num_harness_kills"] >= 2
    assert report["num_finished"] == 4  # each that was not killed looked at its own browser contexts
    # each harness deals every fate once before it draws at random
    every = _fates("jail", _BOX_FATES) | _fates("docker", _BOX_FATES) | _fates("browser", _BROWSER_FATES)
    assert set(report["fates"]) == every


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "kind", "word"),
    [
        ("process", "processes", "sleep"),
        ("container", "containers", ""),
        ("cgroup", "cgroups", "planted"),
        ("engine's cgroup", "cgroups", "docker"),
        ("mount", "mounts", "planted"),
        ("folder", "temporary folders", "palaestra-leases-planted"),
        ("folder elsewhere", "temporary folders", "planted"),
        ("cut record", "records", "planted"),
    ],
)
def test_what_is_left_is_found_and_told(plant: str, kind: str, word: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can plant these")
    if plant == "container":
        require_backend("docker")
    plan = ["--leases", "8", "--concurrency", "4", "--backend", "subprocess", "--settle", "1"]
    report, code = _soak(*plan, "--plant", plant, timeout_s=60)
    assert code == 1
    assert report["wrong"] == []
    assert report["num_finished"] == 4
    # a process, which keeps its harness's stdout, takes each of them away after a while
    assert report["left"]["processes"]
    assert any(word in one for one in report["left"][kind]), report["left"]


def test_a_few_leases_leave_nothing() -> None:
    plan = ["--leases", "8", "--concurrency", "4", "--backend", "subprocess"]
    report, code = _soak(*plan, timeout_s=120)
    assert (code, report["wrong"], report["not_reaped"]) == (0, [], [])
    assert not any(report["left"].values()), report["left"]
