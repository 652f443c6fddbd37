"""Which MiniWoB pages are supported, and which of their seeds are tasks of which split.

`tasks.json` holds one string per form and page: character `i` says what seed `i` is: `t` train, `v` validation,
`x` test, `.` unused. It is written by `_survey.py`, which gives every *content* (the whole first observation) to
one split and uses it once, so no held-out task equals a training task, whatever their seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from palaestra.config import nearest
from palaestra.errors import TaskError
from palaestra.types import Form, JsonObject, Split

COMPACT_PAGES: Final = (
    "click-checkboxes",
    "click-collapsible-2",
    "click-option",
    "click-scroll-list",
    "click-tab-2",
    "choose-list",
    "enter-password",
    "enter-text-dynamic",
    "form-sequence-2",
    "login-user",
    "multi-layouts",
    "multi-orderings",
    "navigate-tree",
    "read-table",
    "read-table-2",
)
"""Pages whose compact tasks are won by matching words and copying numbers; most need two to four calls."""

PAGES: Final = (
    *COMPACT_PAGES,
    "click-button",
    "click-button-sequence",
    "click-checkboxes-transfer",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-tab",
    "click-tab-2-hard",
    "click-test-2",
    "click-widget",
    "copy-paste",
    "enter-text",
    "enter-text-2",
    "find-greatest",
    "find-word",
    "focus-text-2",
    "form-sequence-3",
    "login-user-popup",
    "odd-or-even",
    "phone-book",
    "simple-algebra",
    "simple-arithmetic",
    "use-autocomplete",
)
"""All supported pages."""

LETTERS: Final[Mapping[Split, str]] = {"train": "t", "validation": "v", "test": "x"}
_TRAIN_TASKS_PER_PAGE = 1000
_HELD_OUT_TASKS_PER_PAGE = 40


@dataclass(frozen=True)
class TaskTable:
    """The tasks of a choice of pages in one form: training tasks cycle over the pages, held-out ones are unique."""

    form: Form
    pages: tuple[str, ...]

    def __post_init__(self) -> None:
        known = [page for page in PAGES if page in _table()[self.form]]
        for page in self.pages:
            if page not in known:
                raise TaskError(f"no MiniWoB page {page!r} in the {self.form} form{nearest(page, known)}")
        if not self.pages:
            raise TaskError("pages must name at least one MiniWoB page")

    @property
    def num_tasks(self) -> Mapping[Split, int]:
        """Tasks in each split. A page with few contents repeats in training and is rare in the other splits."""
        held_out: dict[Split, int] = {
            split: len(_held_out(self.form, self.pages, split)) for split in ("validation", "test")
        }
        return {"train": _TRAIN_TASKS_PER_PAGE * len(self.pages), **held_out}

    def data(self, split: Split, index: int) -> JsonObject:
        """Page and seed of a task."""
        if split == "train":
            page = self.pages[index % len(self.pages)]
            seeds = _seeds(self.form, page, split)
            return {"page": page, "seed": seeds[index // len(self.pages) % len(seeds)]}
        page, seed = _held_out(self.form, self.pages, split)[index]
        return {"page": page, "seed": seed}


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    text = files("palaestra.envs.browser").joinpath("tasks.json").read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, str]] = json.loads(text)
    return table


@cache
def _seeds(form: Form, page: str, split: Split) -> Sequence[int]:
    return [seed for seed, letter in enumerate(_table()[form][page]) if letter == LETTERS[split]]


@cache
def _held_out(form: Form, pages: tuple[str, ...], split: Split) -> Sequence[tuple[str, int]]:
    """Round robin over the pages; a page that runs out of contents is left out from then on."""
    seeds = {page: _seeds(form, page, split)[:_HELD_OUT_TASKS_PER_PAGE] for page in pages}
    rounds = range(max(map(len, seeds.values())))
    return [(page, seeds[page][number]) for number in rounds for page in pages if number < len(seeds[page])]
