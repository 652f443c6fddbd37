"""How the service desk speaks, in both forms, and how its request is read back.

Invariant: `parse_request` inverts `request_text` in both forms, and in compact results a number always comes
right after the word that it belongs to.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from palaestra.envs.desk._tasks import Row
from palaestra.types import Form, JsonObject

POLICY = """You work at a service desk and change its records only through the tools.
Do exactly what the request asks, nothing else, and call done when you have finished.
Refund an order only if its condition is lost or broken; otherwise call decline_refund for it.
Never close a ticket and never refund an order that the request is not about."""

_COMPACT = {
    "set": "set {item}{owner} to {value}",
    "give": "give {item}{owner} to {value}",
    "close": "close {item}{owner}",
    "refund": "refund {item}{owner}",
}

_FIRST = {
    "set": (
        "Please change the priority of {name}'s {item} ticket to {value}.",
        "{name} called about the {item} ticket again: set its priority to {value}.",
        "The ticket of {name} about the {item} should have {value} priority from now on.",
    ),
    "give": (
        "Please assign {name}'s {item} ticket to the {value} team.",
        "The {item} problem of {name} is one for the {value} team; hand the ticket over.",
        "Move the ticket that {name} opened about the {item} to {value}.",
    ),
    "close": (
        "Please close {name}'s {item} ticket.",
        "{name} says that the {item} works again, so that ticket can be closed.",
        "The ticket of {name} about the {item} is resolved; close it.",
    ),
    "refund": (
        "{name} would like a refund for the {item}.",
        "Please handle the refund request of {name} for the {item} order.",
        "{name} wants the money back for the {item}; settle it according to the rules.",
    ),
}

_ALSO = {
    "set": ("Also set the {item} ticket to {value} priority.", "And the {item} ticket becomes {value} priority."),
    "give": ("Also assign the {item} ticket to the {value} team.", "And the {item} ticket goes to {value}."),
    "close": ("Also close the {item} ticket.", "And the {item} ticket can be closed."),
    "refund": ("Also settle the refund request for the {item}.",),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing asked for: a verb, the item of the ticket or order, and the new value (empty for some)."""

    verb: str
    item: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """Whose records, and what to do, in order."""

    name: str
    steps: tuple[Step, ...]


def request_text(request: JsonObject, form: Form) -> str:
    """The request of a task in words."""
    steps = [Step(**step) for step in request["steps"]]
    if form == "compact":
        owners = [f" of {request['name']}", *[""] * (len(steps) - 1)]
        said = [_COMPACT[step.verb].format(item=step.item, owner=owner, value=step.value)
                for step, owner in zip(steps, owners, strict=True)]  # fmt: skip
        return " and ".join(said)
    sentences = []
    for position, step in enumerate(steps):
        templates = _ALSO[step.verb] if position else _FIRST[step.verb]
        template = templates[request["phrase"] % len(templates)]
        sentences.append(template.format(name=request["name"].title(), item=step.item, value=step.value))
    return " ".join(sentences)


def parse_request(text: str) -> Request:
    """The request behind a text of either form; raises `ValueError` when it is none of ours."""
    for first, verb in _patterns(is_first=True):
        match = first.match(text)
        if match is None:
            continue
        steps = [Step(verb, match["item"], match.groupdict().get("value", ""))]
        rest = text[match.end() :]
        if rest:
            steps.append(_parse_also(rest))
        return Request(match["name"].lower(), tuple(steps))
    raise ValueError(f"not a request of the service desk: {text!r}")


def result_text(kind: str, rows: Sequence[Row], form: Form) -> str:
    """What a look-up tool answers: rows of `customer`, `ticket` or `order` kind."""
    if form == "full":
        return json.dumps([_titled(row) for row in rows])
    if kind == "customer":
        return " ".join(f"customer {row['id']}" for row in rows)
    if kind == "ticket":
        return " ".join(f"{row['subject']} {row['id']} {row['status']} {row['priority']}" for row in rows)
    return " ".join(f"{row['item']} {row['id']} {row['condition']} {row['status']}" for row in rows)


def parse_result(kind: str, text: str) -> list[Row]:
    """Inverse of `result_text` as far as the text goes; an error gives no rows."""
    if text.startswith("["):
        rows: list[Row] = json.loads(text)
        return rows
    words = text.split()
    if kind == "customer":
        return [{"id": int(words[1])}] if words[:1] == ["customer"] else []
    columns = ("subject", "id", "status", "priority") if kind == "ticket" else ("item", "id", "condition", "status")
    records = [dict(zip(columns, words[i : i + 4], strict=True)) for i in range(0, len(words) - len(words) % 4, 4)]
    return [{**record, "id": int(record["id"])} for record in records if record["id"].isdigit()]


def _titled(row: Mapping[str, object]) -> Row:
    return {key: str(value).title() if key == "name" else value for key, value in row.items()}


def _parse_also(text: str) -> Step:
    for pattern, verb in _patterns(is_first=False):
        match = pattern.fullmatch(text)
        if match is not None:
            return Step(verb, match["item"], match.groupdict().get("value", ""))
    raise ValueError(f"not the second half of a request: {text!r}")


@functools.cache
def _patterns(*, is_first: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    owner = " of {name}" if is_first else ""
    lead = "" if is_first else " and "
    found = [(_to_pattern(lead + template.replace("{owner}", owner)), verb) for verb, template in _COMPACT.items()]
    for verb, templates in (_FIRST if is_first else _ALSO).items():
        found += [(_to_pattern(template if is_first else f" {template}"), verb) for template in templates]
    return tuple(found)


def _to_pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(re.escape("{name}"), r"(?P<name>[A-Za-z]+ [A-Za-z]+)")
    for slot in ("item", "value"):
        pattern = pattern.replace(re.escape("{" + slot + "}"), rf"(?P<{slot}>[a-z]+)")
    return re.compile(pattern)
