"""Hugging Face Transformers in a process of its own, for machines without vLLM; imports it only there."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from palaestra.agents.engines._process import ProcessEngine, WorkerSetup
from palaestra.errors import ConfigError


class TransformersEngine(ProcessEngine):
    """Dynamic batching over one padded attention cache; no prefix caching."""

    _name = "transformers engine"
    _target = "palaestra.agents.engines._transformers_worker:build"

    @classmethod
    def check_machine(cls) -> None:
        """Raise `ConfigError` without torch and Transformers."""
        for library in ("torch", "transformers"):
            if importlib.util.find_spec(library) is None:
                raise ConfigError(f"{library} is not installed; install palaestra[train]")

    @classmethod
    def _environment(cls, setup: WorkerSetup) -> Mapping[str, str]:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if setup.config.device == "cpu" else {}
        return {**super()._environment(setup), **hidden}
