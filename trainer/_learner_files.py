"""What the learner writes to disk: published weights, exported models, checkpoints.

Invariant: files are written beside their place and renamed, so a reader never sees half of one; of a folder that is
there already, the weights are replaced last.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from palaestra.agents.renderers import family_of, mark_family
from palaestra.errors import ConfigError
from palaestra.records import sync_folder

_WEIGHTS = "model.safetensors"
_STATE = "learner.pt"
_COMPANIONS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_NOT_COMPANIONS = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"}


def write_weights(network: Any, folder: Path) -> str:
    """Put `model.safetensors` and `config.json` into `folder`; the SHA-256 of the weights, in hexadecimal."""
    with _replacing(folder) as place:
        return _write_weights(network, place)


def write_model(network: Any, source: Path, folder: Path) -> None:
    """Put weights, configuration and the tokenizer's files of `source` into `folder`."""
    with _replacing(folder) as place:
        _write_weights(network, place)
        copy_companions(source, place)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a model besides weights and configuration: tokenizer, chat template, chat family."""
    if source.resolve() == folder.resolve():
        return
    for path in sorted(source.iterdir()):
        if path.suffix in _COMPANIONS and path.name not in _NOT_COMPANIONS and path.is_file():
            shutil.copyfile(path, folder / path.name)
    mark_family(folder, family_of(source))


def write_state(state: dict[str, Any], folder: Path) -> None:
    """Put a checkpoint into `folder`, on the disk itself when this returns."""
    with _replacing(folder) as place, (place / _STATE).open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The checkpoint in `folder`; raises `ConfigError` when there is none or it is damaged."""
    path = folder / _STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"no learner checkpoint in {folder}") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"learner checkpoint {path} is damaged: {str(error).splitlines()[0]}") from error
    return state


def _write_weights(network: Any, place: Path) -> str:
    path = place / _WEIGHTS
    save_file(_untied(network.state_dict()), path, metadata={"format": "pt"})
    network.config.save_pretrained(place)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once, under their first name, which is the embedding's; safetensors refuses shared memory."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name].contiguous() for name in first.values()}


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    place = folder.with_name(f"{folder.name}.tmp")
    if place.exists():  # left by a process that was killed
        shutil.rmtree(place)
    place.mkdir(parents=True)
    try:
        yield place
        if folder.exists():
            for path in sorted(place.iterdir(), key=lambda path: path.name == _WEIGHTS):
                path.replace(folder / path.name)
        else:
            place.rename(folder)
            sync_folder(folder.parent)
    finally:
        if place.exists():
            shutil.rmtree(place)
