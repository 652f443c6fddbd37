"""Three hundred leases with kills at random leave nothing: the benchmark's soak, in small.

Does not cover: Podman, which the soak takes when it is asked to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.sandboxes.conftest import require_backend
from tests.sandboxes.pages import require_chromium

_SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_hundred_leases_with_kills_leave_nothing() -> None:
    require_backend("jail")
    require_backend("docker")
    require_chromium()
    command = [sys.executable, "-P", str(_SOAK), "--leases", "300", "--concurrency", "16", "--seed", "3", "--json"]
    with tempfile.TemporaryDirectory(prefix="soak-errors-") as folder, Path(folder, "stderr").open("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, timeout=280, check=False)
        errors.seek(0)
        assert done.stdout, errors.read()
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert not any(report["left"].values()), report["left"]
    assert done.returncode == 0
    assert set(report["leases"]) == {"jail", "docker", "browser"}
    assert sum(report["leases"].values()) >= 300
    assert report["num_harness_kills"] >= 2
    assert {"jail: is killed by the host", "docker: is killed by the host"} <= set(report["fates"])
