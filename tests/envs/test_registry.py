"""The registry: one list of environments, Gymnasium's, and refusals that name the nearest id."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import pytest

from palaestra.envs import Env, load_class, register, registration, registrations
from palaestra.errors import ConfigError

OURS = ("palaestra/CodeRepair-v0", "palaestra/MiniWoB-v0", "palaestra/ToolDesk-v0")


def test_our_environments_are_registered_here_and_in_gymnasium() -> None:
    ids = [entry.env_id for entry in registrations()]
    assert set(OURS) <= set(ids)
    assert ids == sorted(ids)
    assert set(ids) <= set(gymnasium.registry)
    assert [registration(env_id).family for env_id in OURS] == ["code", "browser", "tools"]


def test_a_new_environment_can_be_made_by_gymnasium_and_replaced() -> None:
    register("test/Registered-v0", "collections:OrderedDict", family="toy", summary="wrong")
    register("test/Registered-v0", "palaestra.envs.desk:ToolDesk", family="toy", summary="right")
    made = gymnasium.make("test/Registered-v0", form="compact")
    assert isinstance(made.unwrapped, Env)
    made.close()
    assert registration("test/Registered-v0").summary == "right"
    gymnasium.registry.pop("test/Registered-v0")


def test_an_unknown_id_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="unknown environment 'palaestra/ToolDesk'; did you mean 'palaestra/ToolDesk-v0'"
    ):
        registration("palaestra/ToolDesk")
    with pytest.raises(ConfigError, match="valid: palaestra/CodeRepair-v0"):
        load_class("q")


@pytest.mark.parametrize(
    ("entry_point", "words"),
    [
        ("no_such_package.module:Env", "test/Broken-v0 needs a package that is not installed: No module named"),
        ("palaestra.envs.desk:NoSuchClass", "test/Broken-v0: palaestra.envs.desk has no 'NoSuchClass'"),
        ("palaestra.envs:load_class", "palaestra.envs:load_class is not a class"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_refused(entry_point: str, words: str) -> None:
    register("test/Broken-v0", entry_point, family="toy", summary="broken")
    with pytest.raises(ConfigError, match=words):
        load_class("test/Broken-v0")


def test_registering_imports_no_environment() -> None:
    code = "import sys, palaestra.envs; print([m for m in sys.modules if m.startswith('palaestra.envs.')])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "palaestra.envs.desk" not in shown
    assert "palaestra.envs.browser" not in shown
