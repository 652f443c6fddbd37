"""What the agent reads of a page: the accessibility tree in a full and in a compact wording.

Invariant: the wording is a function of the utterance and the tree alone, and a control keeps its number for
the whole episode.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from palaestra.types import Form

INSTRUCTIONS = (
    "You use a web page through its accessibility tree. Each control has a number: [ref=N]. Do what the task says "
    "with the tools click, type and select. [near=...] tells the words beside a field without a name. Every answer "
    "shows the page as it is now. The task ends as soon as the page has what it needs for a verdict, and a wrong "
    "final click cannot be taken back."
)

MAX_TEXT_WORDS = 14
"""Static text of a compact screen beyond this many words is left out."""

_MARKERS = {
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
    "option": "item",
}
_FILLER_WORDS = (
    "a all and any at below between both by corresponds done each field fields for from in input into is it label "
    "labeled list named of on press or switch text that the then this through to when with your"
)
_FILLERS = frozenset(_FILLER_WORDS.split())


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the tree. `ref` 0 marks text and groups; `hint` is the text beside a field without a name."""

    depth: int
    role: str
    name: str
    ref: int
    states: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Screen:
    """A page at one moment, with MiniWoB's own verdict: `reward` counts once `is_done`."""

    utterance: str
    rows: tuple[Row, ...]
    is_done: bool
    reward: float

    @staticmethod
    def from_reply(reply: Mapping[str, Any]) -> Screen:
        """From what `palaestra.begin` and `palaestra.act` of the stage answer."""
        rows = tuple(Row(*row) for row in reply["rows"])
        return Screen(reply["utterance"], rows, bool(reply["done"]), float(reply["reward"]))


def first_text(screen: Screen, form: Form) -> str:
    """The task and the page, as the first message says them: in compact `task words | text words | controls`."""
    if form == "full":
        return f"Task: {screen.utterance}\n{_tree(screen)}"
    return f"{' '.join(_content_words(screen.utterance))} {_compact_page(screen)}"


def next_text(before: Screen, after: Screen, form: Form) -> str:
    """What a step answers: the whole tree in full; in compact what changed, is new or is gone, or `ok`."""
    if after.is_done:
        return "The page is done." if form == "full" else "done"
    if form == "full":
        return _tree(after)
    was, now = ({row.ref: _compact_control(row) for row in _controls(screen)} for screen in (before, after))
    shown = [text for ref, text in now.items() if was.get(ref) != text]
    gone = [str(ref) for ref in was if ref not in now]
    words = [*(["now", *shown] if shown else []), *(["gone", *gone] if gone else [])]
    return " ".join(words) or "ok"


def words_of(text: str) -> list[str]:
    """Lower-case words and whole numbers; punctuation is dropped."""
    return re.findall(r"-?\d+(?![a-z])|[a-z0-9]+", text.lower())


def _content_words(text: str) -> list[str]:
    return [word for word in words_of(text) if word not in _FILLERS]


def _tree(screen: Screen) -> str:
    return "\n".join(["Page:", *(_full_row(row) for row in screen.rows)])


def _full_row(row: Row) -> str:
    parts = ["  " * row.depth + "- " + row.role]
    if row.name:
        parts.append(json.dumps(row.name, ensure_ascii=False))
    if row.ref:
        parts.append(f"[ref={row.ref}]")
    if row.hint:
        parts.append(f"[near={json.dumps(row.hint, ensure_ascii=False)}]")
    for key, value in row.states.items():
        if value is True:
            parts.append(f"[{key}]")
        elif key == "expanded":
            parts.append("[collapsed]")
        elif value is not False:
            parts.append(f"[{key}={json.dumps(value, ensure_ascii=False)}]")
    return " ".join(parts)


def _controls(screen: Screen) -> list[Row]:
    return [row for row in screen.rows if row.ref]


def _compact_page(screen: Screen) -> str:
    hints = {row.hint for row in screen.rows if row.hint}
    texts = [word for row in screen.rows if not row.ref and row.name not in hints for word in _content_words(row.name)]
    controls = [_compact_control(row) for row in _controls(screen)]
    shown = ["|", *texts] if 0 < len(texts) <= MAX_TEXT_WORDS else []
    return " ".join([*shown, "|", *controls])


def _compact_control(row: Row) -> str:
    is_folder = row.role == "clickable" and "expanded" in row.states
    marker = "folder" if is_folder else _MARKERS.get(row.role, row.role)
    name = words_of(row.name) or _content_words(row.hint)
    words = [*([] if name[:1] == [marker] else [marker]), *name, str(row.ref)]
    for option in row.states.get("options", ()):
        words += words_of(option)
    if row.states.get("checked"):
        words.append("on")
    if is_folder and row.states["expanded"]:
        words.append("open")
    if row.states.get("disabled"):
        words.append("off")
    return " ".join(words)
