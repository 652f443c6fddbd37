"""What a reader of the conversation knows about the page: the inverse of `_screen`, for the scripted expert.

Invariant: a view is made from messages alone, the same for a page in either form but for the wording.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from palaestra.types import Message, ToolCall

_FULL_ROW = re.compile(r'^ *- (?P<role>\w+)(?: (?P<name>"(?:[^"\\]|\\.)*"))?(?P<rest>.*)$')
_FULL_STATE = re.compile(r'\[(\w+)(?:=("(?:[^"\\]|\\.)*"|\[[^\]]*\]|\d+))?\]')
_MARKERS = ("button", "link", "text", "check", "radio", "list", "tab", "item", "folder")
_ROLES = {
    "button": "button",
    "link": "link",
    "clickable": "link",
    "textbox": "text",
    "searchbox": "text",
    "spinbutton": "text",
    "checkbox": "check",
    "radio": "radio",
    "combobox": "list",
    "listbox": "list",
    "tab": "tab",
    "menuitem": "item",
}


@dataclass(frozen=True, slots=True)
class Control:
    """A control by its compact role; `name` falls back to the words before a field without a name."""

    ref: int
    role: str
    name: str
    options: tuple[str, ...] = ()
    is_on: bool = False
    is_open: bool = False
    is_disabled: bool = False
    value: str = ""
    is_multiline: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """The page as the conversation tells it. `typed` and `chosen` are what was entered without being refused."""

    is_compact: bool
    utterance: str
    controls: tuple[Control, ...]
    texts: tuple[str, ...]
    typed: dict[int, str] = field(default_factory=dict)
    chosen: dict[int, tuple[str, ...]] = field(default_factory=dict)
    clicked: tuple[int, ...] = ()

    def of(self, *roles: str) -> list[Control]:
        """Controls of the given roles, in order."""
        return [control for control in self.controls if control.role in roles and not control.is_disabled]

    def named(self, name: str, *roles: str) -> Control | None:
        """The first control of the roles with this name; where there is none, the first but for letter case."""
        controls = self.of(*roles)
        exact = [control for control in controls if control.name == name]
        alike = [control for control in controls if control.name.casefold() == name.casefold()]
        return next(iter(exact or alike), None)


def read(conversation: Sequence[Message]) -> View:
    """The view after the last message."""
    first = next(position for position, message in enumerate(conversation) if message.role == "user")
    view = _first_view(conversation[first].content)
    calls: list[ToolCall] = []
    for message in conversation[first + 1 :]:
        if message.role == "assistant":
            calls = list(message.tool_calls)
        elif message.role == "tool" and calls:
            view = _after(view, calls.pop(0), message.content)
    return view


def _first_view(text: str) -> View:
    if text.startswith("Task: "):
        utterance, _, tree = text.removeprefix("Task: ").partition("\n")
        controls, texts = _parse_tree(tree)
        return View(False, utterance, controls, texts)
    utterance, _, page = text.partition(" | ")
    controls, texts = _parse_page("| " + page)
    return View(True, utterance, controls, texts)


def _after(view: View, call: ToolCall, answer: str) -> View:
    if answer.startswith(("error:", "invalid call:")):
        return view
    view = _remember(view, call)
    if answer.startswith("Page:"):
        controls, texts = _parse_tree(answer)
        return replace(view, controls=controls, texts=texts)
    if answer.startswith(("now ", "gone ")):
        shown, _, gone = f" {answer}".partition(" gone ")
        changed = {control.ref: control for control in _parse_controls(shown.split()[1:])}
        known = {control.ref: control for control in view.controls} | changed
        left = [control for ref, control in known.items() if str(ref) not in gone.split()]
        return replace(view, controls=tuple(sorted(left, key=lambda control: control.ref)))
    return view


def _remember(view: View, call: ToolCall) -> View:
    ref = int(call.arguments["ref"])
    if call.name == "type":
        return replace(view, typed={**view.typed, ref: str(call.arguments["text"])})
    if call.name == "select":
        chosen = (*view.chosen.get(ref, ()), str(call.arguments["option"]))
        return replace(view, chosen={**view.chosen, ref: chosen})
    return replace(view, clicked=(*view.clicked, ref))


def _parse_tree(tree: str) -> tuple[tuple[Control, ...], tuple[str, ...]]:
    controls: list[Control] = []
    texts: list[str] = []
    for line in tree.splitlines()[1:]:
        match = _FULL_ROW.match(line)
        if match is None:
            continue
        name = json.loads(match["name"]) if match["name"] else ""
        states: dict[str, Any] = {key: json.loads(value) if value else True for key, value in _states(match["rest"])}
        if "ref" not in states:
            texts += [name] if name else []
            continue
        controls.append(_control(match["role"], name or states.get("near", ""), states))
    return tuple(controls), tuple(texts)


def _states(text: str) -> list[tuple[str, str]]:
    return _FULL_STATE.findall(text)


def _control(role: str, name: str, states: dict[str, Any]) -> Control:
    return Control(
        ref=states["ref"],
        role="folder" if role == "clickable" and states.keys() & {"expanded", "collapsed"} else _ROLES.get(role, role),
        name=name,
        options=tuple(states.get("options", ())),
        is_on="checked" in states,
        is_open="selected" in states or "expanded" in states,
        is_disabled="disabled" in states,
        value=states.get("value", ""),
        is_multiline="multiline" in states,
    )


def _parse_page(text: str) -> tuple[tuple[Control, ...], tuple[str, ...]]:
    parts = text.removeprefix("|").split("|")
    texts = tuple(parts[0].split()) if len(parts) == 2 else ()
    return tuple(_parse_controls(parts[-1].split())), texts


def _parse_controls(words: Sequence[str]) -> list[Control]:
    """Read `marker name... ref option... state...` again and again; a marker begins the next control."""
    groups: list[list[str]] = []
    for word in words:
        if word in _MARKERS and (not groups or _has_ref(groups[-1])):
            groups.append([])
        if groups:
            groups[-1].append(word)
    return [_compact_control(group) for group in groups]


def _has_ref(group: Sequence[str]) -> bool:
    return any(word.isdigit() for word in group[1:])


def _compact_control(group: Sequence[str]) -> Control:
    marker, *words = group
    state = words[-1] if words[-1] in ("on", "open", "off") else ""
    words = words[:-1] if state else words
    # The reference is the last number, but for a list, whose options follow it.
    numbers = [position for position, word in enumerate(words) if word.isdigit()]
    at = numbers[0] if marker == "list" else numbers[-1]
    return Control(
        ref=int(words[at]),
        role=marker,
        name=" ".join(words[:at]),
        options=tuple(words[at + 1 :]),
        is_on=state == "on",
        is_open=state == "open",
        is_disabled=state == "off",
    )
