"""The table of tasks: splits that share no seed, counts that add up."""

from __future__ import annotations

import pytest

from palaestra.envs import EnvLimits
from palaestra.envs.browser import MiniWoB
from palaestra.envs.browser._expert import plan_of
from palaestra.envs.browser._pages import COMPACT_PAGES, PAGES, TaskTable, _seeds
from palaestra.envs.browser._survey import split_of
from palaestra.errors import ConfigError, TaskError
from palaestra.sandboxes.browser import BrowserConfig
from palaestra.types import Form, Split

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def test_there_are_enough_pages() -> None:
    assert len(COMPACT_PAGES) >= 10
    assert len(set(PAGES)) == len(PAGES) >= 12
    assert all(callable(plan_of(page)) for page in PAGES)
    assert MiniWoB.COMPACT_PAGES == COMPACT_PAGES


@pytest.mark.parametrize(("form", "pages"), [("compact", COMPACT_PAGES), ("full", PAGES)])
def test_splits_share_no_task(form: Form, pages: tuple[str, ...]) -> None:
    table = TaskTable(form, pages)
    tasks = {
        split: {(data["page"], data["seed"]) for data in (table.data(split, i) for i in range(table.num_tasks[split]))}
        for split in _SPLITS
    }
    assert not tasks["train"] & tasks["validation"]
    assert not tasks["train"] & tasks["test"]
    assert not tasks["validation"] & tasks["test"]
    assert len(tasks["test"]) == table.num_tasks["test"] >= 100
    assert {page for page, _ in tasks["train"]} == set(pages)


@pytest.mark.parametrize("page", COMPACT_PAGES)
def test_compact_page_has_training_tasks(page: str) -> None:
    assert len(_seeds("compact", page, "train")) >= 40


def test_training_tasks_take_turns_over_the_pages() -> None:
    env = MiniWoB(form="compact", pages=["login-user", "choose-list"])
    assert [env.make_task("train", index).data["page"] for index in range(4)] == ["login-user", "choose-list"] * 2
    assert env.num_tasks["train"] == 2000
    assert MiniWoB(form="full").num_tasks["train"] == 1000 * len(PAGES)


def test_unknown_page_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(TaskError, match="did you mean 'login-user'"):
        MiniWoB(pages=["login-usr"])
    with pytest.raises(TaskError, match="compact"):
        MiniWoB(form="compact", pages=["simple-algebra"])
    with pytest.raises(TaskError, match="at least one"):
        MiniWoB(pages=[])


def test_split_is_a_function_of_the_content() -> None:
    splits = [split_of("page", f"content {number}") for number in range(1000)]
    assert splits == [split_of("page", f"content {number}") for number in range(1000)]
    assert 700 <= splits.count("train") <= 880
    assert min(splits.count("validation"), splits.count("test")) >= 50


def test_browser_settings_may_be_a_table_as_from_toml() -> None:
    env = MiniWoB(browser={"max_tabs": 3}, limits={"max_turns": 4})
    assert env._browser == BrowserConfig(max_tabs=3)
    assert env.limits == EnvLimits(max_turns=4)
    assert hash(env._key) == hash(MiniWoB(browser=BrowserConfig(max_tabs=3))._key)
    with pytest.raises(ConfigError, match="browser: unknown key 'max_tab'; did you mean 'max_tabs'"):
        MiniWoB(browser={"max_tab": 3})
    with pytest.raises(ConfigError, match="browser must be a table, not 3"):
        MiniWoB(browser=3)  # type: ignore[arg-type]
