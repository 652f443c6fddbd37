"""The two wordings of a page, on trees written by hand, and the expert's reading of them."""

from __future__ import annotations

import pytest

from palaestra.envs.browser._screen import Row, Screen, first_text, next_text, words_of
from palaestra.envs.browser._view import Control, read
from palaestra.types import Message, ToolCall

_ROWS = (
    Row(0, "text", "Username", 0),
    Row(0, "textbox", "", 1, {"value": "bob"}, "Username"),
    Row(0, "list", "", 0),
    Row(1, "clickable", "Docs", 2, {"expanded": False}),
    Row(0, "checkbox", 'the "big" box', 3, {"checked": True}),
    Row(0, "combobox", "", 4, {"options": ["Peru", "South Sudan"], "value": "Peru"}),
    Row(0, "button", "Go!", 5, {"disabled": True}),
)
_BEFORE = Screen('Enter the name "bob", then press Go.', _ROWS, False, 0.0)


def _with(*rows: Row) -> Screen:
    return Screen(_BEFORE.utterance, rows, False, 0.0)


def test_full_text_is_the_indented_tree() -> None:
    assert first_text(_BEFORE, "full").splitlines() == [
        'Task: Enter the name "bob", then press Go.',
        "Page:",
        '- text "Username"',
        '- textbox [ref=1] [near="Username"] [value="bob"]',
        "- list",
        '  - clickable "Docs" [ref=2] [collapsed]',
        '- checkbox "the \\"big\\" box" [ref=3] [checked]',
        '- combobox [ref=4] [options=["Peru", "South Sudan"]] [value="Peru"]',
        '- button "Go!" [ref=5] [disabled]',
    ]


def test_compact_text_is_one_line_of_words() -> None:
    assert first_text(_BEFORE, "compact") == (
        "enter name bob go | "
        "text username 1 folder docs 2 check the big box 3 on list 4 peru south sudan button go 5 off"
    )


def test_compact_static_text_is_shown_when_short() -> None:
    rows = (Row(0, "cell", "Color", 0), Row(0, "cell", "red", 0), Row(0, "textbox", "", 1))
    assert first_text(Screen("Enter color.", rows, False, 0.0), "compact") == "enter color | color red | text 1"
    many = tuple(Row(0, "text", f"word{number}", 0) for number in range(15))
    assert first_text(Screen("Enter color.", (*many, rows[2]), False, 0.0), "compact") == "enter color | text 1"


def test_compact_answer_says_what_changed() -> None:
    checked = [row if row.ref != 3 else Row(0, "checkbox", "the box", 3, {"checked": False}) for row in _ROWS]
    assert next_text(_BEFORE, _BEFORE, "compact") == "ok"
    assert next_text(_BEFORE, _with(*checked), "compact") == "now check the box 3"
    assert next_text(_BEFORE, _with(*_ROWS[:2], Row(0, "link", "x", 9)), "compact") == "now link x 9 gone 2 3 4 5"
    assert next_text(_BEFORE, Screen("", (), True, 1.0), "compact") == "done"


@pytest.mark.parametrize(
    ("text", "words"), [("-5 and 5ft 9in!", ["-5", "and", "5ft", "9in"]), ("Tab #1", ["tab", "1"])]
)
def test_words_are_lower_case_without_punctuation(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize("form", ["compact", "full"])
def test_reading_inverts_the_wording(form: str) -> None:
    view = read([Message("user", first_text(_BEFORE, "full" if form == "full" else "compact"))])
    assert [(control.ref, control.role) for control in view.controls] == [
        (1, "text"),
        (2, "folder"),
        (3, "check"),
        (4, "list"),
        (5, "button"),
    ]
    assert view.controls[2].is_on
    assert view.controls[4].is_disabled
    assert view.controls[0].name.lower() == "username"


def test_reading_follows_changes_and_remembers_what_was_entered() -> None:
    calls = [
        ToolCall(name="type", arguments={"ref": 1, "text": "ann"}),
        ToolCall(name="click", arguments={"ref": 7}),
        ToolCall(name="click", arguments={"ref": 2}),
    ]
    answers = ["ok", "error: no element 7", "now folder docs 2 open link notes 3"]
    messages = [Message("user", "click notes | text 1 folder docs 2")]
    for one, answer in zip(calls, answers, strict=True):
        messages += [Message("assistant", tool_calls=(one,)), Message("tool", answer, name=one.name)]
    view = read(messages)
    assert view.typed == {1: "ann"}
    assert view.clicked == (2,)
    assert view.controls[1:] == (Control(2, "folder", "docs", is_open=True), Control(3, "link", "notes"))
