"""What Gymnasium asks of an environment, through the synchronous calls."""

from __future__ import annotations

import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import palaestra.envs  # noqa: F401  # registers the id
from palaestra.envs.browser import MiniWoB
from palaestra.types import Form
from tests.envs.browser.players import call


@pytest.mark.parametrize("form", ["compact", "full"])
def test_gymnasium_accepts_it(chromium: None, form: Form) -> None:
    env = MiniWoB(form=form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)
    env.close()
    env.close()


def test_it_is_made_by_its_id_and_survives_two_closes(chromium: None) -> None:
    env = gymnasium.make("palaestra/MiniWoB-v0", pages=["login-user"])
    observation, info = env.reset(seed=3)
    assert observation == env.reset(seed=3)[0]
    assert info["task_id"].startswith("palaestra/MiniWoB-v0/train/")
    answer, reward, terminated, truncated, _ = env.step(call("click", ref=1))
    assert answer[0].content.startswith("Page:")
    assert (reward, terminated, truncated) == (0.0, False, False)
    env.close()
    env.close()


def test_tools_are_click_type_select() -> None:
    env = MiniWoB()
    assert [tool.name for tool in env.tools] == ["click", "type", "select"]
    assert env.tools[1].parameters["required"] == ["ref", "text"]
