"""Engines: what samples tokens. Each runs in its own process; its library loads when it is opened."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from palaestra.agents.engines._config import EngineConfig
from palaestra.agents.engines._limits import check_model_path, fit_context
from palaestra.config import nearest
from palaestra.errors import ConfigError

if TYPE_CHECKING:
    from palaestra.agents.engines._process import ProcessEngine

__all__ = ["ENGINES", "EngineConfig", "check_engine", "check_model_path", "fit_context", "open_engine"]

ENGINES = {
    "transformers": "palaestra.agents.engines.transformers:TransformersEngine",
    "vllm": "palaestra.agents.engines.vllm:VllmEngine",
}


async def open_engine(
    name: str, model_path: str | Path, config: EngineConfig, log_path: Path | None = None, *, version: int = 0
) -> ProcessEngine:
    """Start the engine called `name`; raises `ConfigError` for an unknown name or a model that does not load.

    `log_path` receives what the engine prints, by default a new file in the system's temporary folder.
    """
    engine_class = _load(name)
    if log_path is None:
        descriptor, path = tempfile.mkstemp(prefix=f"palaestra-{name}-", suffix=".log")
        os.close(descriptor)
        log_path = Path(path)
    return await engine_class.start(model_path, config, log_path=log_path, version=version)


def check_engine(name: str) -> None:
    """Raise `ConfigError` when there is no engine called `name`, or when what it needs is not installed."""
    _load(name).check_machine()


def _load(name: str) -> type[ProcessEngine]:
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}{nearest(name, list(ENGINES))}")
    module, _, attribute = ENGINES[name].partition(":")
    engine_class: type[ProcessEngine] = getattr(importlib.import_module(module), attribute)
    return engine_class
