"""Sizing a training job: a minute of measurement, a model of the step, and a proposal.

The step is predicted from what the parts did alone and together (`_model.py`), never from a table of hardware.
"""

from palaestra.trainer.sizing._measure import measure
from palaestra.trainer.sizing._measured import EngineLevel, EpisodeWork, LearnerLevel, Measurements
from palaestra.trainer.sizing._model import Prediction, Setting, predict, setting_of
from palaestra.trainer.sizing._propose import Change, Proposal, propose
from palaestra.trainer.sizing._record import SIZE_FILE, PredictedSettings, conditions_of, read_size, write_size
from palaestra.trainer.sizing._toml import to_toml

__all__ = [
    "SIZE_FILE",
    "Change",
    "EngineLevel",
    "EpisodeWork",
    "LearnerLevel",
    "Measurements",
    "PredictedSettings",
    "Prediction",
    "Proposal",
    "Setting",
    "conditions_of",
    "measure",
    "predict",
    "propose",
    "read_size",
    "setting_of",
    "to_toml",
    "write_size",
]
