"""`gymnasium.make("palaestra/...")` works in a fresh Python that never imports palaestra itself."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from palaestra.envs import registrations

ROOT = Path(__file__).parents[1]


def test_ids_are_known_without_importing_palaestra() -> None:
    script = (
        "import sys, gymnasium\n"
        "assert 'palaestra' not in sys.modules\n"
        "env = gymnasium.make('palaestra/ToolDesk-v0')\n"
        "print(type(env.unwrapped).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "ToolDesk\n"), done.stderr


def test_start_of_python_imports_neither_gymnasium_nor_palaestra() -> None:
    script = "import sys; print([m for m in ('gymnasium', 'palaestra', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_two_readers_of_the_manifests_agree() -> None:
    before = list(sys.meta_path)
    try:
        listed = runpy.run_path(str(ROOT / "scripts" / "palaestra_gymnasium.py"))["environments"]()
    finally:
        sys.meta_path[:] = before
    ours = {row.env_id: row.entry_point for row in registrations() if row.env_id.startswith("palaestra/")}
    assert len(ours) >= 3
    assert listed == ours


@pytest.mark.parametrize("manifest", ["[CodeRepair\n", '[CodeRepair]\nname = "x"\n', '[CodeRepair]\nid = "bad id!"\n'])
def test_a_damaged_manifest_is_a_warning_and_gymnasium_works(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "palaestra" / "envs" / "code"
    folder.mkdir(parents=True)
    (folder / "environments.toml").write_text(manifest)
    (tmp_path / "palaestra" / "__init__.py").touch()
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import gymnasium; print(gymnasium.make('CartPole-v1'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CartPole" in done.stdout
    assert "reinstall it" in done.stderr
