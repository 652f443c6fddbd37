"""Agentic environments behind the Gymnasium interface, and the asynchronous trainer for agents in them.

Importing this registers the environments with Gymnasium; torch, vLLM and Ray load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from palaestra.envs import EnvSuite, register

if TYPE_CHECKING:
    from palaestra.agents import evaluate
    from palaestra.trainer import GRPOConfig, Trainer

__version__ = "0.0.1"

_LAZY = {"GRPOConfig": "palaestra.trainer", "Trainer": "palaestra.trainer", "evaluate": "palaestra.agents"}

__all__ = ["EnvSuite", "GRPOConfig", "Trainer", "__version__", "evaluate", "register"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'palaestra' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
