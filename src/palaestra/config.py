"""Typed configuration: frozen pydantic models, read from TOML, refused with the nearest valid key.

Invariant: a configuration that loads is complete and consistent; nothing is silently ignored.
"""

from __future__ import annotations

import copy
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from palaestra.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration: immutable, keyword only, no unknown keys, no infinity unless a field allows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def parse(cls: type[ConfigT], values: Mapping[str, Any], *, source: str = "configuration") -> ConfigT:
        """Validate `values`; raises `ConfigError` with one line for each problem.

        A table changes only the keys that it names: the others keep what this class sets by default, even
        where that differs from the defaults of the nested class.
        """
        try:
            return cls.model_validate(_over_defaults(cls, values))
        except ValidationError as error:
            lines = [_explain(cls, detail) for detail in error.errors()]
            raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises `ConfigError` when it cannot be read or parsed."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}") from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def override(values: dict[str, Any], assignments: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `values` with dotted leaf keys replaced: `{"rl.steps": 10}` sets `values["rl"]["steps"]`."""
    result = copy.deepcopy(values)
    for dotted, value in assignments.items():
        *tables, leaf = dotted.split(".")
        target = result
        for table in tables:
            child = target.setdefault(table, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{dotted}: {table} is a value, not a table")
            target = child
        target[leaf] = value
    return result


def nearest(name: str, names: list[str]) -> str:
    """A hint `; did you mean 'x'?` for a mistyped name, or the list of valid ones."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(sorted(names))}"


def _over_defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, field in model.model_fields.items():
        given, default = values.get(name), field.default
        if isinstance(given, Mapping) and isinstance(default, BaseModel):
            merged[name] = merge(default.model_dump(exclude_unset=True), _over_defaults(type(default), given))
    return merged


def merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`, table by table."""
    merged = {**defaults, **values}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            merged[name] = merge(default, value)
    return merged


def _explain(model: type[BaseModel], detail: Mapping[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    dotted = ".".join(location)
    if detail["type"] == "extra_forbidden":
        fields = list(_model_at(model, location[:-1]).model_fields)
        return f"unknown key {dotted!r}{nearest(location[-1], fields)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    for name in location:
        field = model.model_fields.get(name)
        candidates = () if field is None else (field.annotation, *get_args(field.annotation))
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        model = nested[0] if nested else model
    return model
