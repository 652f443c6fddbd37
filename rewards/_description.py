"""What a reward term is, as JSON: its class and its parameters, so that two that score otherwise are told apart.

Invariant: what a description says depends on how a term was made, not on the process: no addresses, no order of sets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Set
from enum import Enum
from functools import cached_property, partial
from pathlib import PurePath
from typing import Any

import numpy as np
from pydantic import BaseModel

_COMPUTED = (property, cached_property, classmethod, staticmethod)


def class_of(value: object) -> str:
    """Module and qualified name of a value's class."""
    return _path_of(type(value))


def parameters_of(term: object) -> dict[str, Any]:
    """A term's public attributes, and arguments of its `__init__` that it keeps under their name with an underscore.

    Attributes of its class count, methods and properties do not, nor does its `name`.
    """
    kept = dict(_public_attributes(term))
    for argument in list(inspect.signature(type(term).__init__).parameters)[1:]:
        if argument not in kept and hasattr(term, f"_{argument}"):
            kept[argument] = getattr(term, f"_{argument}")
    return {name: _plain(value) for name, value in sorted(kept.items()) if name != "name"}


def _public_attributes(term: object) -> Iterator[tuple[str, Any]]:
    if isinstance(term, BaseModel):  # whose class has public attributes that are none of the user's
        yield from term
        return
    for name in dir(term):
        of_class = inspect.getattr_static(type(term), name, None)
        is_said = not name.startswith("_") and not callable(of_class) and not isinstance(of_class, _COMPUTED)
        if is_said and hasattr(term, name):  # a slot may hold nothing
            yield name, getattr(term, name)


def _plain(value: Any) -> Any:
    """A parameter as JSON; of what is no plain value, and has no fields that say more, its class."""
    if isinstance(value, Enum):
        return f"{class_of(value)}.{value.name}"
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # NaN differs from itself
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bytes | np.ndarray):
        return _digest(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((_plain(item) for item in value), key=json.dumps)
    return _described(value)


def _described(value: Any) -> Any:
    if not isinstance(value, type) and callable(getattr(value, "describe", None)):  # a term, a gate, a stack
        return value.describe()
    if isinstance(value, partial):
        given = {"args": _plain(value.args), "keywords": _plain(value.keywords)}
        return {"callable": _plain(value.func), **given}
    if callable(value) and hasattr(value, "__qualname__"):
        return _path_of(value)
    fields: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif isinstance(value, BaseModel):
        fields = dict(value)
    return {"class": class_of(value), **({"parameters": _plain(fields)} if fields else {})}


def _path_of(value: type | Callable[..., Any]) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _digest(value: bytes | np.ndarray[Any, Any]) -> str:
    array = np.asarray(memoryview(value)) if isinstance(value, bytes) else value
    described = f"{array.dtype} {array.shape}\n".encode()
    return f"sha256:{hashlib.sha256(described + array.tobytes()).hexdigest()}"
