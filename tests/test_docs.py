"""The documentation: it builds without a warning, its marked examples run, and what the others import exists."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_LIMIT_S = 120

# A Python block, and whether `<!-- run -->` stands before it or `.run` in its attributes.
BLOCK = re.compile(
    r"^(?P<comment><!-- run -->\n+)?```(?P<language>python|\{[^}\n]*\.python[^}\n]*\})\n(?P<code>.*?)^```$", re.M | re.S
)


class Example(NamedTuple):
    """A Python block of a page."""

    place: str
    code: str
    is_run: bool


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start("code")) + 1
            is_run = block["comment"] is not None or ".run" in block["language"]
            found.append(Example(f"{page.relative_to(ROOT)}:{line}", block["code"], is_run))
    return found


def named(some: list[Example]) -> list[object]:
    return [pytest.param(example.code, id=example.place) for example in some]


@pytest.mark.timeout(RUN_LIMIT_S)
@pytest.mark.parametrize("code", named([example for example in examples() if example.is_run]))
def test_marked_example_runs(code: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, "-P", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("code", named([example for example in examples() if not example.is_run]))
def test_other_example_parses_and_imports_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("palaestra"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_python_block_is_found() -> None:
    num_fences = sum(len(re.findall(r"^\s*```\{?\s*\.?python", page.read_text(), re.M)) for page in PAGES)
    assert len(examples()) == num_fences > 0


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("mkdocs")),
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "index.html").is_file()


def test_readme_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target
