"""`Trainer.fit` and the parts of asynchronous GRPO; warm-up, learner, ledger, weight sync, reports."""

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.trainer import FitResult, Trainer

__all__ = ["FitResult", "GRPOConfig", "Trainer"]
