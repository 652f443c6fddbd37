"""Plans for MiniWoB's pages: from a view to the steps still to do, one small function for each kind of page.

Invariant: a plan reads the view alone, never the task's data; its first step is right whatever came before.
Text fields count as done once something was typed into them: a plan does not proofread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from palaestra.envs.browser._view import View

Kind = Literal["click", "type", "select"]


@dataclass(frozen=True, slots=True)
class Step:
    """One call: `text` is what is typed, or the option chosen."""

    kind: Kind
    ref: int
    text: str = ""


Plan = Callable[[View], "list[Step]"]


def find(pattern: str, view: View) -> str:
    """The first group of a pattern in the utterance, or an empty text."""
    match = re.search(pattern, view.utterance, re.IGNORECASE)
    return match[1].strip() if match else ""


def remaining(view: View, steps: Sequence[Step], *submit: str) -> list[Step]:
    """The steps that are not done yet, and then the button with one of the names, or the last one."""
    buttons = [button for name in submit if (button := view.named(name, "button", "link")) is not None]
    last = (buttons or view.of("button", "link"))[-1]
    return [step for step in steps if not is_done(view, step)] + [Step("click", last.ref)]


def is_done(view: View, step: Step) -> bool:
    """Whether the view shows, or remembers, that a step was made."""
    if step.kind == "type":
        return step.ref in view.typed
    if step.kind == "select":
        return step.text in view.chosen.get(step.ref, ())
    return any(control.ref == step.ref and control.is_on for control in view.controls)


def click_named(pattern: str, *roles: str) -> Plan:
    """Click the control that the utterance names."""

    def plan(view: View) -> list[Step]:
        wanted = find(pattern, view)
        control = view.named(wanted, *roles) or view.named(wanted.split(">")[-1], *roles)
        return [Step("click", control.ref)] if control else []

    return plan


def fill(*patterns: str) -> Plan:
    """Type what each pattern finds into the text fields in turn, then submit."""

    def plan(view: View) -> list[Step]:
        fields = view.of("text")
        texts = [find(pattern, view) for pattern in patterns]
        return remaining(view, [Step("type", field.ref, text) for field, text in zip(fields, texts, strict=False)])

    return plan


def tick_boxes(view: View) -> list[Step]:
    """Tick the boxes that are named, untick the others, submit."""
    words = _listed(view)
    steps = [Step("click", box.ref) for box in view.of("check") if (box.name.casefold() in words) is not box.is_on]
    return [*steps, Step("click", view.of("button")[-1].ref)]


def _listed(view: View) -> set[str]:
    if view.is_compact:
        return set(view.utterance.split()[1:])
    listed = find(r"select (.*?)(?: from the (?:scroll )?list)? and click", view)
    return {part.strip().casefold() for part in listed.split(", ")}


def choose_radio(view: View) -> list[Step]:
    """Choose the option that is named, submit."""
    wanted = find(r"select (\S+)", view)
    option = view.named(wanted, "radio")
    return remaining(view, [Step("click", option.ref)] if option else [])


def choose_from_list(view: View) -> list[Step]:
    """Choose the options that are named in the list, submit."""
    box = view.of("list")[0]
    words = _listed(view)
    wanted = [option for option in box.options if option.casefold() in words]
    chosen = view.chosen.get(box.ref, ())
    if "scroll" in view.utterance:  # several may be chosen; elsewhere one choice replaces the other
        left = [option for option in wanted if option not in chosen]
    else:
        left = [] if chosen else wanted
    return remaining(view, [Step("select", box.ref, option) for option in left])


def open_until_found(view: View) -> list[Step]:
    """Open tab after tab until the link that the utterance names is there; click it."""
    wanted = find(r'link "?(.+?)"?\.?$', view)
    link = next((one for one in view.of("link") if one.name == wanted), None)
    if link is not None:
        return [Step("click", link.ref)]
    seen = set(view.clicked)
    if view.of("link"):  # something is open from the start: the first, where the wording does not say which
        seen.add(next((tab.ref for tab in view.of("tab") if tab.is_open), view.of("tab")[0].ref))
    unseen = [tab for tab in view.of("tab") if tab.ref not in seen]
    return [Step("click", unseen[0].ref)] if unseen else []


def walk_tree(view: View) -> list[Step]:
    """Click the name that is asked for, or open the first folder not yet opened."""
    wanted = find(r'(?:named|file) "?([^"\s]+)"?\.?$', view)
    found = view.named(wanted, "link", "folder")
    if found is not None:
        return [Step("click", found.ref)]
    unopened = [one for one in view.of("folder") if one.ref not in view.clicked]
    return [Step("click", one.ref) for one in unopened[:1]]


def search_movies(view: View) -> list[Step]:
    """Genre, director and year into the fields named so, whatever their order."""
    values = (
        (r"genre", find(r"search (?:for )?(\S+)", view)),
        (r"director", find(r"directed (?:by )?(.+?) (?:from )?year", view)),
        (r"year|date", find(r"year (\d+)", view)),
    )
    steps = [
        Step("type", field.ref, text)
        for field in view.of("text")
        for label, text in values
        if re.search(label, field.name, re.IGNORECASE)
    ]
    return remaining(view, steps)


def read_value(view: View) -> list[Step]:
    """Type the value beside the key that the utterance names."""
    key = find(r"value (?:of )?(.+?) (?:into the text field and press )?submit", view)
    return remaining(view, [Step("type", view.of("text")[0].ref, _value(view, key))])


def read_values(view: View) -> list[Step]:
    """Type into each field the value beside the key that stands before the field."""
    return remaining(view, [Step("type", one.ref, _value(view, one.name.rstrip(":"))) for one in view.of("text")])


def _value(view: View, key: str) -> str:
    if not view.is_compact:
        return view.texts[view.texts.index(key) + 1]
    words, wanted = list(view.texts), key.split()
    at = next(i for i in range(len(words)) if words[i : i + len(wanted)] == wanted)
    return words[at + len(wanted)]


def fill_third(view: View) -> list[Step]:
    """The n-th radio button, a number into the m-th field, submit."""
    radio = int(find(r"(\d)\w* radio", view)) - 1
    field = int(find(r"(\d)\w* textbox", view)) - 1
    number = find(r'number "?(-?\d+)', view)
    steps = [Step("click", view.of("radio")[radio].ref), Step("type", view.of("text")[field].ref, number)]
    return remaining(view, steps)


COMPACT_PLANS: Final[Mapping[str, Plan]] = {
    "click-checkboxes": tick_boxes,
    "click-checkboxes-transfer": tick_boxes,
    "click-collapsible-2": open_until_found,
    "click-option": choose_radio,
    "click-scroll-list": choose_from_list,
    "click-tab-2": open_until_found,
    "click-tab-2-hard": open_until_found,
    "choose-list": choose_from_list,
    "enter-password": fill(r'password "?([^"\s]+)"?', r'password "?([^"\s]+)"?'),
    "enter-text": fill(r'enter "?([^"\s]+)"?'),
    "enter-text-dynamic": fill(r'enter "?([^"\s]+)"?'),
    "form-sequence-2": fill_third,
    "login-user": fill(r'username "?([^"\s]+)"?', r'password "?([^"\s]+)"?'),
    "multi-layouts": search_movies,
    "multi-orderings": search_movies,
    "navigate-tree": walk_tree,
    "read-table": read_value,
    "read-table-2": read_values,
}
"""Plans of the pages that exist in both forms."""
