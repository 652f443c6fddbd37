"""What makes a model the same model, wherever its folder lies and however its path is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from palaestra.errors import ConfigError

_CONFIG = "config.json"
_PREFIX = "sha256:"
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
    """A digest of a model's folder, cheap also for large models; nothing is fetched.

    Of a hub name it is that of the whole snapshot on this machine, and the name itself where there is none. It covers
    configuration, tokenizer and chat template whole, and of each weights file name, size and the first MiB.
    Raises `ConfigError` for a folder without configuration.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        snapshot = _snapshot_of(model)
        return model if snapshot is None else _digest(snapshot)
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    return _digest(folder)


def identity_beside(recorded: str, model: str) -> str:
    """The identity of a model, or the one on record where the two cannot be compared yet.

    That is so for a hub name that was not fetched when it was recorded, or is not now.
    """
    now = identity_of(model)
    is_open = recorded == model or (now == model and recorded.startswith(_PREFIX))
    return recorded if is_open else now


def _digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    wording = [path for path in folder.iterdir() if path.name in _WORDING]
    for path in sorted([*wording, *_weights_in(folder)]):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(-1 if path.name in _WORDING else _LOOKED_AT))
    return f"{_PREFIX}{digest.hexdigest()}"


def _weights_in(folder: Path) -> list[Path]:
    """Those that are loaded: what else a hub keeps beside safetensors may be fetched later, or never."""
    by_suffix = ([path for path in folder.iterdir() if path.suffix == suffix] for suffix in _WEIGHTS)
    return next(filter(None, by_suffix), [])


def _snapshot_of(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        return folder if _is_whole(folder) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no hub name, never fetched, or damaged
        return None


def _is_whole(folder: Path) -> bool:
    """Whether all that is loaded is there: a tokenizer is fetched before its weights, and those one by one."""
    weights = _weights_in(folder)
    if not weights or not (folder / _CONFIG).is_file():
        return False
    indices = [json.loads(path.read_text()) for path in folder.glob(f"*{weights[0].suffix}.index.json")]
    named = [folder / name for index in indices for name in index["weight_map"].values()]
    return all(path.is_file() for path in (*weights, *named))


def place_of(model: str) -> str:
    """Where a model is, told so that it is found from any folder; a hub name stays as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model
