"""vLLM in a process of its own, on a CPU or a GPU; importing this does not import vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from palaestra.agents.engines._process import ProcessEngine, WorkerSetup
from palaestra.errors import ConfigError


class VllmEngine(ProcessEngine):
    """Continuous batching with prefix caching; weights are replaced in place between two steps."""

    _name = "vllm engine"
    _target = "palaestra.agents.engines._vllm_worker:build"

    @classmethod
    def check_machine(cls) -> None:
        """Raise `ConfigError` without vLLM."""
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed; install palaestra[cpu] or palaestra[gpu], or choose the engine 'transformers'"
            )

    @classmethod
    def _environment(cls, setup: WorkerSetup) -> Mapping[str, str]:
        return {
            **super()._environment(setup),
            # with vLLM's own processes the step loop could not run between our calls
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # else the CPU backend pins the process to the first core, next to everybody else's first core
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            **({"CUDA_VISIBLE_DEVICES": ""} if setup.config.device == "cpu" else {}),
        }
