"""What makes a model the same model, wherever its folder lies and however its path is written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from palaestra.errors import ConfigError

_CONFIG = "config.json"
_LOOKED_AT = 1 << 20
_WEIGHTS = (".safetensors", ".bin")
_WORDING = frozenset(
    (
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
)
"""How text becomes tokens, and conversations text."""


def identity_of(model: str) -> str:
    """A digest of a local folder, cheap also for large models; a hub name is its own identity.

    It covers configuration, tokenizer and chat template whole, and of each weights file name, size and the first MiB.
    Raises `ConfigError` for a folder without configuration.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS or path.name in _WORDING):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(-1 if path.name in _WORDING else _LOOKED_AT))
    return f"sha256:{digest.hexdigest()}"


def place_of(model: str) -> str:
    """Where a model is, told so that it is found from any folder; a hub name stays as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model
