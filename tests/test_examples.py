"""Every example runs as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.parts import missing_bwrap, missing_chromium, missing_vllm

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    require("vllm", missing_vllm())
    require("bwrap", missing_bwrap())
    require("chromium", missing_chromium())
    done = subprocess.run(
        [sys.executable, "-P", str(path)], capture_output=True, text=True, check=False, timeout=580, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
