"""The main job: a small model from nothing, warmed up, trained and judged on three families of environments."""

from palaestra.trainer.quickstart._config import FOR_GIVEN_MODEL, QuickstartConfig
from palaestra.trainer.quickstart._job import QuickstartResult, run_quickstart

__all__ = ["FOR_GIVEN_MODEL", "QuickstartConfig", "QuickstartResult", "run_quickstart"]
