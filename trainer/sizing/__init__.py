"""Sizing a training job: a minute of measurement, a model of the step, and a proposal.

The step is predicted from what the parts did alone and together (`_model.py`), never from a table of hardware.
"""

from palaestra.trainer.sizing._job import chosen_values, proposed_job
from palaestra.trainer.sizing._measure import measure
from palaestra.trainer.sizing._measured import Measurements
from palaestra.trainer.sizing._model import Prediction
from palaestra.trainer.sizing._propose import Proposal, propose
from palaestra.trainer.sizing._record import PredictedSettings, conditions_of, read_size, write_size
from palaestra.trainer.sizing._toml import to_toml

__all__ = [
    "Measurements",
    "PredictedSettings",
    "Prediction",
    "Proposal",
    "chosen_values",
    "conditions_of",
    "measure",
    "propose",
    "proposed_job",
    "read_size",
    "to_toml",
    "write_size",
]
