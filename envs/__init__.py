"""Agentic environments behind the Gymnasium interface, their base class, tools and suites."""

from palaestra.envs import _builtin
from palaestra.envs._base import DEFAULT_REWARD, Env, EnvLimits
from palaestra.envs._experts import Decision, Expert
from palaestra.envs._registry import Registration, load_class, register, registration, registrations
from palaestra.envs._suite import EnvSuite
from palaestra.envs._tools import ToolError, tool

_builtin.register_all()

__all__ = [
    "DEFAULT_REWARD",
    "Decision",
    "Env",
    "EnvLimits",
    "EnvSuite",
    "Expert",
    "Registration",
    "ToolError",
    "load_class",
    "register",
    "registration",
    "registrations",
    "tool",
]
