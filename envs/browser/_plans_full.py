"""Plans for the pages that are played in the full form only: arithmetic, reading, menus, guessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from palaestra.envs.browser._plans import Plan, Step, click_named, find, remaining
from palaestra.envs.browser._view import View


def click_both(view: View) -> list[Step]:
    """Button ONE and then button TWO."""
    return [Step("click", one.ref) for one in view.of("button") if one.ref not in view.clicked]


def click_widget(view: View) -> list[Step]:
    """Any control of the kind that is asked for."""
    wanted = find(r'"(\w+)"', view)
    role = {"radio": "radio", "checkbox": "check", "button": "button"}.get(wanted, "text")
    fitting = [one for one in view.of(role) if one.is_multiline is (wanted == "textarea")]
    return [Step("click", one.ref) for one in fitting[:1]]


def copy_text(view: View) -> list[Step]:
    """The text of the full field into the empty one."""
    source = next(one for one in view.of("text") if one.value and one.ref not in view.typed)
    target = next(one for one in view.of("text") if one.ref != source.ref)
    return remaining(view, [Step("type", target.ref, source.value)])


def change_case(view: View) -> list[Step]:
    """The quoted text in the letter case that is asked for."""
    text = find(r'"(.+?)"', view)
    changed = text.upper() if "upper" in view.utterance else text.lower()
    return remaining(view, [Step("type", view.of("text")[0].ref, changed)])


def find_word(view: View) -> list[Step]:
    """The n-th word of the paragraph, without punctuation."""
    number = int(find(r"(\d+)\w\w word", view))
    word = re.sub(r"[^a-zA-Z]", "", view.texts[0].split()[number - 1])
    return remaining(view, [Step("type", view.of("text")[0].ref, word)])


def focus_field(view: View) -> list[Step]:
    """The n-th text field."""
    return [Step("click", view.of("text")[int(find(r"(\d)\w\w input", view)) - 1].ref)]


def pick_greatest(view: View) -> list[Step]:
    """The card with the greatest number, then submit."""
    best = max(view.of("link"), key=lambda one: int(one.name))
    return [] if best.ref in view.clicked[-1:] else [Step("click", best.ref)]


def choose_and_press(view: View) -> list[Step]:
    """The option in the list, then the button."""
    box = view.of("list")[0]
    step = Step("select", box.ref, find(r"choose (.+?) from the dropdown", view))
    return remaining(view, [step], find(r'labeled "(.+?)"', view))


def log_in_despite_popup(view: View) -> list[Step]:
    """Cancel the popup whenever it is there; fill the form in again where it was not."""
    cancel = view.named("Cancel", "button")
    if cancel is not None:
        return [Step("click", cancel.ref)]
    values = (find(r'username "(.+?)"', view), find(r'password "(.+?)"', view))
    fields = zip(view.of("text"), values, strict=True)
    empty = [Step("type", one.ref, text) for one, text in fields if not one.value]
    return [*empty, Step("click", view.of("button")[-1].ref)]


def mark_parity(view: View) -> list[Step]:
    """Odd or even beside each number, then submit."""
    numbers = [int(text) for text in view.texts if re.fullmatch(r"-?\d+", text)]
    buttons = view.of("button")
    wanted = [buttons[2 * row + 1 - number % 2] for row, number in enumerate(numbers)]
    steps = [Step("click", one.ref) for one in wanted if one.ref not in view.clicked]
    return [*steps, Step("click", buttons[-1].ref)]


def look_up_contact(view: View) -> list[Step]:
    """Turn the pages of the book up to the name, then click the entry."""
    name = find(r"find (.+?) in the contact book", view)
    kind = find(r"their (\w+)", view)
    links = view.of("link")
    if name in view.texts:
        return [Step("click", links[("phone", "email", "address").index(kind)].ref)]
    return [Step("click", one.ref) for one in links if one.name == ">"]


def solve_algebra(view: View) -> list[Step]:
    """`x + a = b`, `x - a = b`, `a + x = b` or `a - x = b`."""
    left, sign, right, total = re.findall(r"(\w+) ([+-]) (\w+) = (-?\d+)", " ".join(view.texts))[0]
    number = int(right if left == "x" else left)
    value = int(total) - number if sign == "+" else int(total) + number if left == "x" else number - int(total)
    return remaining(view, [Step("type", view.of("text")[0].ref, str(value))])


def solve_arithmetic(view: View) -> list[Step]:
    """`a + b`, `a - b` or `a x b`."""
    left, sign, right = re.findall(r"(\d+) ([-+x]) (\d+)", " ".join(view.texts))[0]
    first, second = int(left), int(right)
    value = {"+": first + second, "-": first - second, "x": first * second}[sign]
    return remaining(view, [Step("type", view.of("text")[0].ref, str(value))])


def complete_text(view: View) -> list[Step]:
    """Type the beginning, choose from what the field offers, submit."""
    start, end = find(r'starts with "(.+?)"', view), find(r'ends with "(.+?)"', view)
    fitting = [one for one in view.of("link") if one.name.startswith(start) and one.name.endswith(end)]
    field = view.of("text")[0]
    if field.ref not in view.typed:
        return [Step("type", field.ref, start)]
    if fitting:
        return [Step("click", fitting[0].ref)]
    return [Step("click", view.of("button")[-1].ref)]


FULL_PLANS: Final[Mapping[str, Plan]] = {
    "click-button": click_named(r'"(.+)" button', "button"),
    "click-button-sequence": click_both,
    "click-dialog": lambda view: [Step("click", view.of("button")[0].ref)],
    "click-dialog-2": lambda view: (
        click_named(r'labeled "(.+)"', "button")(view) or [Step("click", view.of("button")[0].ref)]
    ),
    "click-link": click_named(r'link "(.+)"\.', "link"),
    "click-tab": click_named(r"click on (.+)\.", "tab"),
    "click-test-2": click_named(r"button (\w+)", "button"),
    "click-widget": click_widget,
    "copy-paste": copy_text,
    "enter-text-2": change_case,
    "find-greatest": lambda view: [*pick_greatest(view), Step("click", view.of("button")[-1].ref)],
    "find-word": find_word,
    "focus-text-2": focus_field,
    "form-sequence-3": choose_and_press,
    "login-user-popup": log_in_despite_popup,
    "odd-or-even": mark_parity,
    "phone-book": look_up_contact,
    "simple-algebra": solve_algebra,
    "simple-arithmetic": solve_arithmetic,
    "use-autocomplete": complete_text,
}
"""Plans of the pages that exist in the full form only."""
