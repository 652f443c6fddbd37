"""`ToolDesk` as an ordinary Gymnasium environment, called plainly."""

from __future__ import annotations

import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from palaestra.envs.desk import ToolDesk
from palaestra.errors import TaskError
from palaestra.types import Form


@pytest.mark.parametrize("form", ["compact", "full"])
def test_gymnasium_accepts_it_without_a_warning(form: Form) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("palaestra/ToolDesk-v0", form=form)
        check_env(env.unwrapped, skip_render_check=True)
        env.close()


def test_a_whole_episode_called_plainly() -> None:
    env = ToolDesk(form="compact")
    observation, info = env.reset(options={"index": 0})
    assert info == {"task_id": "palaestra/ToolDesk-v0/train/0"}
    conversation = list(observation)
    is_over = False
    while not is_over:
        action = env.expert().decide(env.task, conversation).best
        assert env.action_space.contains(action)
        observation, reward, is_over, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert not truncated
        conversation += [action, *observation]
    assert info["facts"]["success"] == 1.0
    assert reward > 1.0
    env.close()
    env.close()


def test_an_impossible_port_is_refused_at_once() -> None:
    with pytest.raises(TaskError, match="server_port must be in 0 to 65535, not 70000"):
        ToolDesk(server_port=70_000)
