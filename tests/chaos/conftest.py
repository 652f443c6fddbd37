"""What all chaos tests share: the model, and the run that nobody kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.lives import Run
from tests.chaos.rounds import SYNC, play_round
from tests.chaos.walker import make_walker


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_walker(tmp_path_factory.mktemp("walker"))


@pytest.fixture(scope="session")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run with Transformers in sync mode; how it saves its checkpoints changes no bit of it."""
    run = Run(folder=tmp_path_factory.mktemp("unbroken"), model=model, config=SYNC.config())
    played = play_round(run, None)
    assert played.is_over
    assert played.complaints == ()
    return run
