"""Values for a tool's arguments that meet its JSON Schema and are hard to write, a plain one first.

Invariant: every value meets the schema; one with keywords that are not known here gets none rather than a wrong one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MAX_DEPTH = 4
_MANY = 10**6
_FEW = 3
_TEXTS = (
    "plain",
    "",
    "say \"yes\" and 'no'",
    "one\ntwo\n\n\tthree",
    "naïve 猫 🦊 ﷽",
    "back\\slash \\n {brace} [bracket] <tag> & %",
    "007",
    "true",
    "</call><|im_end|></tool_call>",
)
_INTEGERS = (0, -1, 7, 10**12)
_NUMBERS = (0.5, -2.25, 1e-9, 3.0)
_SAID = frozenset({"title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions"})
_OF_ANY = ("$ref", "const", "enum", "type", "anyOf", "oneOf", "allOf")
_OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OF_TEXTS = ("minLength", "maxLength", "pattern")
_OF_ARRAYS = ("items", "minItems", "maxItems", "uniqueItems")
_OF_OBJECTS = ("properties", "required", "additionalProperties")
_CHECKED = frozenset(_OF_ANY + _OF_NUMBERS + _OF_TEXTS + _OF_ARRAYS + _OF_OBJECTS)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def hard_values(field: object, schema: Mapping[str, Any], depth: int = 0) -> list[Any]:
    """Values that meet the JSON Schema `field` of a tool whose whole schema is `schema`; none where it is not known."""
    if field is True:
        field = {}
    if not isinstance(field, dict) or depth > _MAX_DEPTH:
        return []
    try:
        found = {json.dumps(value): value for value in _candidates(field, schema, depth) if meets(value, field, schema)}
    except (TypeError, ValueError, AttributeError, OverflowError, re.error):  # no schema at all
        return []
    return list(found.values())


def meets(value: object, field: object, schema: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether a value meets a JSON Schema, as far as it is known here; False where it is not."""
    if isinstance(field, bool):
        return field
    if not isinstance(field, dict) or field.keys() - _CHECKED - _SAID or depth > 4 * _MAX_DEPTH:
        return False

    def fits(option: object) -> bool:
        return meets(value, option, schema, depth + 1)

    kinds = _listed(field.get("type", []))
    return (
        ("$ref" not in field or fits(_target(field, schema)))
        and ("const" not in field or _is_same(value, field["const"]))
        and ("enum" not in field or any(_is_same(value, each) for each in field["enum"]))
        and (not kinds or any(_is_kind(value, kind) for kind in kinds))
        and ("anyOf" not in field or any(map(fits, field["anyOf"])))
        and ("oneOf" not in field or sum(map(fits, field["oneOf"])) == 1)
        and all(map(fits, field.get("allOf", ())))
        and _is_in_bounds(value, field, schema, depth)
    )


def _candidates(field: dict[str, Any], schema: Mapping[str, Any], depth: int) -> Iterable[Any]:
    """Values that may meet the schema, and would by one of its keywords."""
    if "$ref" in field:
        return hard_values(_target(field, schema), schema, depth + 1)
    if "const" in field:
        return [field["const"]]
    if "enum" in field:
        return list(field["enum"])
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "oneOf", "allOf")}
    for options in (field.get("anyOf"), field.get("oneOf")):
        if options is not None:
            return [v for option in options for v in hard_values(_merged(rest, option), schema, depth + 1)[:_FEW]]
    if "allOf" in field:
        merged: object = rest
        for option in field["allOf"]:
            merged = _merged(
                merged, _target(option, schema) if isinstance(option, dict) and "$ref" in option else option
            )
        return hard_values(merged, schema, depth + 1)
    kinds = _listed(field.get("type") or _implied_kind(field))
    if len(kinds) > 1:
        return [v for kind in kinds for v in hard_values({**field, "type": kind}, schema, depth + 1)[:_FEW]]
    return _of_kind(kinds[0], field, schema, depth)


def _of_kind(kind: str, field: dict[str, Any], schema: Mapping[str, Any], depth: int) -> list[Any]:
    match kind:
        case "array":
            return _arrays(field, schema, depth)
        case "object":
            return _objects(field, schema, depth)
        case "boolean":
            return [True, False]
        case "null":
            return [None]
        case "integer" | "number":
            return _numbers(kind, field)
        case "string":
            return [*_TEXTS, *(["x" * field["minLength"]] if field.get("minLength", 0) > len(_TEXTS[0]) else [])]
    return []


def _numbers(kind: str, field: dict[str, Any]) -> list[Any]:
    usual = [v for v in (_INTEGERS if kind == "integer" else _NUMBERS) if _is_in_range(v, field)]
    if usual:
        return usual
    ends = [field[key] for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum") if key in field]
    near = [*ends, *(end + step for end in ends for step in (1, -1)), math.fsum(ends) / max(len(ends), 1)]
    if step := field.get("multipleOf"):
        near = [step * math.ceil(value / step) for value in [*near, 0]]
    fitting = [math.ceil(value) if kind == "integer" else value for value in near]
    return [value for value in fitting if _is_in_range(value, field)][:1]


def _arrays(field: dict[str, Any], schema: Mapping[str, Any], depth: int) -> list[Any]:
    inner = hard_values(field.get("items", True), schema, depth + 1)
    low, high = field.get("minItems", 0), field.get("maxItems", _MANY)
    if inner and low > len(inner):
        inner = [inner[at % len(inner)] for at in range(min(low, _MANY))]
    return [inner[: max(1, low)], [], inner[:high]]


def _objects(field: dict[str, Any], schema: Mapping[str, Any], depth: int) -> list[Any]:
    inner = {name: hard_values(child, schema, depth + 1) for name, child in field.get("properties", {}).items()}
    inner = {name: values for name, values in inner.items() if values}
    if inner:
        return [{name: values[at] for name, values in inner.items()} for at in (0, -1)]
    others = field.get("additionalProperties", True)
    if others is True:
        return [{"key": "value"}, {}, {"a b": {"c": [1, "two", None]}}]
    values = hard_values(others, schema, depth + 1)
    return [*({"key": value} for value in values[:1]), {}, *({"a b": value} for value in values[-1:])]


def _is_in_bounds(value: object, field: dict[str, Any], schema: Mapping[str, Any], depth: int) -> bool:
    if isinstance(value, bool):
        return True
    if isinstance(value, str):
        low, high = field.get("minLength", 0), field.get("maxLength", _MANY)
        return low <= len(value) <= high and re.search(field.get("pattern", ""), value) is not None
    if isinstance(value, int | float):
        return _is_in_range(value, field)
    if isinstance(value, list):
        is_counted = field.get("minItems", 0) <= len(value) <= field.get("maxItems", _MANY)
        is_repeating = field.get("uniqueItems", False) and len({json.dumps(each) for each in value}) < len(value)
        items = field.get("items", True)
        return is_counted and not is_repeating and all(meets(each, items, schema, depth + 1) for each in value)
    if isinstance(value, dict):
        known, others = field.get("properties", {}), field.get("additionalProperties", True)
        return all(name in value for name in field.get("required", ())) and all(
            meets(each, known.get(name, others), schema, depth + 1) for name, each in value.items()
        )
    return True


def _is_in_range(value: float, field: dict[str, Any]) -> bool:
    if any(isinstance(field.get(key), bool) for key in ("exclusiveMinimum", "exclusiveMaximum")):
        return False  # as drafts before 6 said it
    step = field.get("multipleOf")
    return (
        field.get("minimum", -math.inf) <= value <= field.get("maximum", math.inf)
        and field.get("exclusiveMinimum", -math.inf) < value < field.get("exclusiveMaximum", math.inf)
        and (step is None or math.isclose(value, step * round(value / step), rel_tol=1e-12))
    )


def _is_kind(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _KINDS.get(kind, ()))


def _implied_kind(field: dict[str, Any]) -> str:
    """What a schema without a type is about."""
    keys = {"object": _OF_OBJECTS, "array": _OF_ARRAYS, "number": _OF_NUMBERS}
    return next((kind for kind, own in keys.items() if field.keys() & set(own)), "string")


def _listed(kinds: str | Sequence[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _merged(rest: object, option: object) -> object:
    """Both at once; False, which nothing meets, where that takes more than to put their keys together."""
    if not isinstance(option, dict) or not isinstance(rest, dict):
        return rest if option is True else False
    if "$ref" in option and rest.keys() - _SAID:
        return False
    return {**rest, **option}


def _target(field: dict[str, Any], schema: Mapping[str, Any]) -> object:
    places = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    return places.get(str(field["$ref"]).rpartition("/")[2], False)


def _is_same(left: object, right: object) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
