"""Where a model is, and how long a context it was made for, known before any process starts."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from palaestra.agents.engines._config import EngineConfig
from palaestra.errors import ConfigError

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What a model's name on the hub looks like; anything else is a folder."""

_log = logging.getLogger("palaestra")


def check_model_path(model_path: str | Path) -> str:
    """The folder or hub name; raises `ConfigError` for obvious mistakes, before a process spends seconds on imports."""
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a model folder: it has no config.json")
        return str(folder.resolve())
    if not _HUB_NAME.fullmatch(str(model_path)):
        raise ConfigError(f"no such model folder: {folder}")
    return str(model_path)


def fit_context(config: EngineConfig, model_path: str) -> EngineConfig:
    """`config`, with `max_model_len` cut to what the model was made for; unchanged where that is not known."""
    limit = _num_positions(model_path)
    if limit is None or config.max_model_len <= limit:
        return config
    _log.debug("max_model_len %d is cut to the %d positions of %s", config.max_model_len, limit, model_path)
    return config.model_copy(update={"max_model_len": limit})


def _num_positions(model_path: str) -> int | None:
    path = _config_file(model_path)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        text: dict[str, Any] = values.get("text_config") or values
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        # a stretched rotary embedding reaches further than this number: only the engine's library knows how far
        is_stretched = rope.get("rope_type", rope.get("type", "default")) != "default"
        limit = text.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None  # the engine's process loads the model and says what is wrong with it
    return limit if isinstance(limit, int) and not is_stretched else None


def _config_file(model_path: str) -> Path | None:
    if Path(model_path).is_dir():
        return Path(model_path) / "config.json"
    if not _HUB_NAME.fullmatch(model_path):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model_path, "config.json"))
    except (OSError, ValueError):  # no such model, or no network: the engine's process says which
        return None
