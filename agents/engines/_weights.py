"""Reading a folder of weights in the child, checked as a whole before the first tensor is replaced.

Torch and safetensors are imported here, so only worker processes import this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from palaestra.errors import ConfigError, PolicyError

Shapes: TypeAlias = dict[str, tuple[int, ...]]
_TIED_HEAD = "lm_head.weight"


def read_weights(
    folder: str | Path, expected: Shapes, *, is_tied: bool, checksum: str | None = None
) -> dict[str, Tensor]:
    """Tensors of all `*.safetensors` in `folder`, which must be exactly `expected` by name and shape.

    Where a `checksum` is given, `model.safetensors` is the only file and has this SHA-256.

    A model with tied embeddings may or may not store its head; it is left out. Raises `PolicyError`.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise PolicyError(f"no model.safetensors in {folder}")
    if checksum is not None:
        _check(paths, checksum)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"cannot read weights {path}: {error}") from error
    if is_tied:
        tensors.pop(_TIED_HEAD, None)
    found: Shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise PolicyError(f"weights in {folder} do not fit the model: {_difference(found, expected)}")
    return tensors


def stored_shapes(model_path: str, *, is_tied: bool) -> Shapes:
    """Name and shape of each tensor that a model folder (or hub name, already fetched) stores.

    Raises `ConfigError` when it has no safetensors, or by name for one that cannot be read.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(model_path, local_files_only=True))
    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot read weights {path}: {error}") from error
    if not shapes:
        raise ConfigError(f"{model_path} has no *.safetensors; save it with save_pretrained")
    if is_tied:
        shapes.pop(_TIED_HEAD, None)
    return shapes


def _check(paths: Sequence[Path], checksum: str) -> None:
    try:
        with paths[0].open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PolicyError(f"cannot read weights {paths[0]}: {error}") from error
    if len(paths) > 1 or found != checksum:
        raise PolicyError(
            f"weights in {paths[0].parent} are not the published ones: SHA-256 {found[:12]}, published {checksum[:12]}"
        )


def _difference(found: Shapes, expected: Shapes) -> str:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unknown"
        if found[name] != expected[name]:
            return f"{name} has shape {found[name]}, the model {expected[name]}"
    return "no difference"
