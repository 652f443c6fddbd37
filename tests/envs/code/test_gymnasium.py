"""CodeRepair as an ordinary Gymnasium environment."""

from __future__ import annotations

import pickle

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import palaestra  # noqa: F401  (registers the environments)
from palaestra.envs.code import CodeRepair
from palaestra.errors import TaskError
from palaestra.types import Form
from tests.envs.code.conftest import call


@pytest.mark.parametrize("form", ["compact", "full"])
def test_check_env_is_clean(form: Form, sandbox: str) -> None:
    env = CodeRepair(form=form, sandbox=sandbox)
    check_env(env, skip_render_check=True)
    env.close()
    env.close()


def test_gymnasium_makes_it(sandbox: str) -> None:
    env = gymnasium.make("palaestra/CodeRepair-v0", form="compact", sandbox=sandbox)
    first, _ = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    assert first == again
    _, reward, terminated, truncated, info = env.step(call("done"))
    assert (terminated, truncated, info["facts"]["success"]) == (True, False, 0.0)
    assert float(reward) == pytest.approx(0.1)
    env.close()


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("compact", {"read": set(), "write": {"line", "text"}, "run": set(), "done": set()}),
        ("full", {"read": {"path"}, "write": {"path", "content"}, "run": {"command"}, "done": set()}),
    ],
)
def test_each_form_has_its_tools(form: Form, arguments: dict[str, set[str]]) -> None:
    env = CodeRepair(form=form)
    assert {spec.name: set(spec.parameters["properties"]) for spec in env.tools} == arguments


def test_indices_end_where_the_split_ends() -> None:
    env = CodeRepair()
    with pytest.raises(TaskError):
        env.make_task("test", env.num_tasks["test"])


def test_an_environment_pickles(sandbox: str) -> None:
    env = pickle.loads(pickle.dumps(CodeRepair(form="compact", sandbox=sandbox)))
    env.reset(seed=1)
    env.step(call("read"))
    env.close()
