"""The chat family of a model: what its folder says, else its name on the hub, else its architecture.

Invariant: a copy of a model whose family is known says so itself, because it keeps neither the hub's name nor the
choice of who opened it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palaestra.errors import ConfigError
from palaestra.records import write_whole

MARKER = "palaestra"
"""Key of `tokenizer_config.json` that says how to render: `{"renderer": "compact"}` or `{"family": "qwen3"}`."""

_TOKENIZER_CONFIG = "tokenizer_config.json"
_HUB_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_BY_ARCHITECTURE = {
    "gemma4": "gemma4",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_vl": "qwen3-vl",
    "qwen3_vl_moe": "qwen3-vl",
}
"""Only architectures whose published chat models share one format; Llama's, for one, carry dozens."""
_OTHER_FORMAT = "<function="
"""In the chat templates of Qwen3-Coder and Prime's Qwen3, whose architecture is Qwen3's and whose format is not."""


def family_of(model: Path | str, family: str | None = None) -> str | None:
    """The chat family of a model folder or hub name: `family` if given, else what can be found out, else None.

    None too for a model of ours, which has a format of its own.
    """
    folder = Path(model).expanduser()
    if has_own_format(folder):
        return None
    marker = read_marker(folder)
    return family or marker.get("family") or _by_hub_name(str(model)) or _by_architecture(folder)


def has_own_format(model: Path | str) -> bool:
    """Whether this is the folder of a model made by `palaestra`, whose chat format is its own."""
    return read_marker(Path(model).expanduser()).get("renderer") == "compact"


def mark_family(folder: Path, family: str | None) -> None:
    """Let a model folder say its family itself; nothing happens where there is none to say."""
    if family is None or read_marker(folder).get("family") == family:
        return
    path = folder / _TOKENIZER_CONFIG
    write_whole(path, json.dumps({**_read_json(path), MARKER: {"family": family}}, indent=2) + "\n")


def read_marker(folder: Path) -> Mapping[str, Any]:
    """What a tokenizer folder says about rendering; empty where it says nothing."""
    path = folder / _TOKENIZER_CONFIG
    marker = _read_json(path).get(MARKER, {})
    if not isinstance(marker, dict):
        raise ConfigError(f'{path}: "{MARKER}" must be an object such as {{"renderer": "compact"}}')
    return marker


def _by_hub_name(model: str) -> str | None:
    match = _HUB_SNAPSHOT.search(model)
    if match is None and Path(model).is_dir():
        return None
    from renderers.base import MODEL_RENDERER_MAP

    family: str | None = MODEL_RENDERER_MAP.get(f"{match[1]}/{match[2]}" if match else model)
    return family


def _by_architecture(folder: Path) -> str | None:
    family = _BY_ARCHITECTURE.get(str(_read_json(folder / "config.json").get("model_type")))
    if family is None:
        return None
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else ""
    return None if _OTHER_FORMAT in text + str(_read_json(folder / _TOKENIZER_CONFIG).get("chat_template")) else family


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {path}: it is no JSON object")
    return value
