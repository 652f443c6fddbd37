"""What the learner writes to disk: published weights, exported models, checkpoints.

Invariant: files are written beside their place and renamed, so a reader never sees half of one; of a folder that is
there already, the weights are replaced last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from palaestra.agents.renderers import family_of, mark_family
from palaestra.errors import FULL, ConfigError
from palaestra.records import sync_folder

_WEIGHTS = "model.safetensors"
_STATE = "learner.pt"
_STATE_KEYS = {"version", "num_updates", "parameters", "moments", "rng"}
_NO_ROOM = 1 << 16
"""Fewer free bytes than this, and what could not be written did not find room."""
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
    with _replacing(folder) as place, _full_disk_named(place), (place / _STATE).open("wb") as file:
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
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"learner checkpoint {path} is damaged: {reason}") from error
    if not isinstance(state, dict) or state.keys() != _STATE_KEYS:
        raise ConfigError(f"learner checkpoint {path} is damaged: it does not hold what a learner saves")
    return state


def _write_weights(network: Any, place: Path) -> str:
    path = place / _WEIGHTS
    with _full_disk_named(place):
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
def _full_disk_named(place: Path) -> Iterator[None]:
    """Raise the system's own error where torch or safetensors hide behind theirs that there was no room."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        number = _full_disk(error, place)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def _full_disk(error: BaseException, place: Path) -> int | None:
    """Which of the errors of a full disk is behind another one; where its causes do not tell, the disk is asked."""
    cause: BaseException | None = error
    while cause is not None:
        for number in FULL:
            if (isinstance(cause, OSError) and cause.errno == number) or os.strerror(number) in str(cause):
                return number
        cause = cause.__cause__ or cause.__context__
    return errno.ENOSPC if shutil.disk_usage(place).free < _NO_ROOM else None


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
