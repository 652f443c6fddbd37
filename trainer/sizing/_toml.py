"""TOML of plain values, for files that a person pastes or edits: tables, arrays, strings, numbers, booleans."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(values: Mapping[str, Any]) -> str:
    """The values as TOML text, plain keys before tables; `tomllib.loads` gives them back. None is left out."""
    lines: list[str] = []
    _add_table(values, (), lines)
    return "\n".join(lines).strip() + "\n"


def _add_table(values: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    if path and (plain or not tables):
        lines.extend(["", f"[{'.'.join(_key(part) for part in path)}]"])
    lines.extend(f"{_key(key)} = {_value(value)}" for key, value in plain.items())
    for key, table in tables.items():
        _add_table(table, (*path, key), lines)


def _key(text: str) -> str:
    return text if _BARE.fullmatch(text) else _quote(text)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    return _quote(str(value))


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML has no pairs of surrogates and refuses a bare DEL
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
