"""How large a model is, read from its configuration and from the headers of its weights: nothing is loaded."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palaestra.agents.engines import check_model_path
from palaestra.errors import ConfigError

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100 << 20
_INDEX = "model.safetensors.index.json"
_TIED_HEAD = "lm_head.weight"


class UnknownSizeError(Exception):
    """A model may well be whole, and says its size in a way that is not read here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Counts that decide about memory."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


def find_model(model: str) -> str:
    """The folder, or the hub name of a model that can be had; raises `ConfigError` in one line.

    A relative folder that is not there looks like a hub name.
    """
    path = check_model_path(model)
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(path, "config.json")
        except (OSError, ValueError) as error:
            why = str(error).strip().partition("\n")[0]
            raise ConfigError(f"no model folder {model!r}, nor a hub model that can be reached: {why}") from error
    return path


def read_size(model: str) -> ModelSize:
    """The size of a model folder, or of a hub model that is already here.

    Raises `UnknownSizeError` where its configuration has other keys or its weights another format, and `ConfigError`
    where it is damaged.
    """
    folder = _folder(model)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text: dict[str, Any] = values.get("text_config") or values
        num_heads = int(text["num_attention_heads"])
        hidden = int(text["hidden_size"])
        return ModelSize(
            num_parameters=_count_parameters(folder, is_tied=bool(text.get("tie_word_embeddings"))),
            num_layers=int(text["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_size=int(text.get("intermediate_size") or 4 * hidden),
            num_heads=num_heads,
            num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
            head_dim=int(text.get("head_dim") or hidden // num_heads),
            vocab_size=int(text["vocab_size"]),
        )
    except KeyError as error:
        raise UnknownSizeError(f"the config.json of {folder} has no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the size of {folder}: {type(error).__name__}: {error}") from error


def _folder(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model!r} is no folder here and has not been fetched from the hub") from error


def _count_parameters(folder: Path, *, is_tied: bool) -> int:
    count = 0
    for path in _weight_files(folder):
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if length > _MAX_HEADER:
                raise ValueError(f"{path.name} has no safetensors header")
            header = json.loads(file.read(length))
        names = [name for name in header if name != "__metadata__" and not (is_tied and name == _TIED_HEAD)]
        count += sum(math.prod(header[name]["shape"]) for name in names)
    return count


def _weight_files(folder: Path) -> list[Path]:
    """Those that a model is loaded from: others beside them hold the same weights for other programs."""
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    if found := sorted(folder.glob("model*.safetensors")):
        return found
    raise UnknownSizeError(f"{folder} has no weights in model*.safetensors")
