"""The build back end: setuptools, plus two files that make Gymnasium find our environments by name.

Gymnasium 1.x no longer reads entry points, so that `gymnasium.make("palaestra/...")` would need an import of
palaestra first. Every wheel, editable or not, therefore carries `palaestra_gymnasium.py` and a `.pth` file that
loads it when Python starts: see docs/decisions/gymnasium-ids.md.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_MODULE = Path(__file__).with_name("palaestra_gymnasium.py")
_PTH = b"import palaestra_gymnasium\n"


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """The wheel of setuptools with our two files."""
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    _add_files(Path(wheel_directory) / name)
    return name


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """The editable wheel of setuptools with our two files."""
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    _add_files(Path(wheel_directory) / name)
    return name


def _add_files(wheel: Path) -> None:
    added = {"palaestra_gymnasium.py": _MODULE.read_bytes(), "palaestra_gymnasium.pth": _PTH}
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                data += "".join(_record(name, content) for name, content in added.items()).encode()
            target.writestr(entry, data)
        for name, content in added.items():
            target.writestr(name, content)
    partial.replace(wheel)


def _record(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"
