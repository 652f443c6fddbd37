"""`size.json`: what was predicted, kept in the run folder so that a report can hold it against reality.

Invariant: a prediction is kept with all settings that it was made for; it says nothing about others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palaestra.errors import ConfigError
from palaestra.records import write_whole
from palaestra.trainer._model_identity import identity_of
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.job import Job
from palaestra.trainer.sizing._measured import Measurements
from palaestra.trainer.sizing._model import Prediction
from palaestra.trainer.sizing._propose import Proposal

SIZE_FILE = "size.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedSettings:
    """A prediction, the settings it was made for, and what they are called: `now` or `proposed`."""

    name: str
    conditions: Mapping[str, Any]
    predicted: Prediction


def conditions_of(model: str, suite: Mapping[str, Any], config: GRPOConfig) -> dict[str, Any]:
    """All that a prediction depends on, by its key in the job's file; JSON values."""
    learner, engine = config.learner, config.engine_settings
    return {
        "model": identity_of(model),
        "suite": dict(suite),
        **{f"train.{name}": getattr(config, name) for name in _TRAIN_KEYS},
        "train.sampling.max_tokens": config.sampling.max_tokens,
        **{f"train.learner.{name}": getattr(learner, name) for name in _LEARNER_KEYS},
        **{f"train.engine_config.{name}": getattr(engine, name) for name in _ENGINE_KEYS},
        "cores of the machine": len(os.sched_getaffinity(0)),
    }


_TRAIN_KEYS = (
    "mode",
    "max_lag",
    "group_size",
    "num_spare",
    "groups_per_step",
    "concurrency",
    "engine",
    "drop_zero_variance",
    "train_on_truncated",
    "group_timeout_s",
    "canary_every",
)
_LEARNER_KEYS = ("max_micro_batch_tokens", "num_epochs", "num_minibatches", "threads", "device", "precision")
_ENGINE_KEYS = (
    "max_num_seqs",
    "max_model_len",
    "threads",
    "device",
    "dtype",
    "kv_cache_mb",
    "gpu_memory_utilization",
    "batch_invariant",
)


def write_size(run: Path, job: Job, proposed: Job, measured: Measurements, proposal: Proposal) -> Path:
    """Write `size.json` into a run folder, which is made if need be; raises `ConfigError` where it cannot.

    What is proposed has no prediction there where it moves cores or memory: speeds were measured with others.
    """
    predictions = [("now", job, proposal.now)]
    if proposal.is_as_measured:
        predictions.append(("proposed", proposed, proposal.proposed))
    values = {
        "format": _FORMAT,
        "predictions": [
            {
                "name": name,
                "conditions": conditions_of(each.model, each.suite.build().describe(), each.train),
                "predicted": predicted.to_json(),
            }
            for name, each, predicted in predictions
        ],
        "proposed": proposal.assignments,
        "measured": measured.to_json(),
    }
    path = run / SIZE_FILE
    try:
        write_whole(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place with --run") from error
    return path


def read_size(run: Path) -> list[PredictedSettings] | None:
    """The predictions kept in a run folder; None where there are none. Raises `ConfigError` for a damaged file."""
    path = run / SIZE_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return [
            PredictedSettings(
                name=each["name"], conditions=each["conditions"], predicted=Prediction(**each["predicted"])
            )
            for each in values["predictions"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {error}); run `palaestra size`") from error
