"""`max_model_len` is cut to what a model was made for, where its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from palaestra.agents.engines import EngineConfig
from palaestra.agents.engines._limits import fit_context


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": 8192}, 4096),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default"}}, 1024),
        ({"max_position_embeddings": 1024, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 4096),
        ({}, 4096),
        ([], 4096),
    ],
)
def test_context_is_cut_to_what_the_model_was_made_for(tmp_path: Path, model: Any, expected: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert fit_context(EngineConfig(), str(tmp_path)).max_model_len == expected


def test_a_shorter_context_stays(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 1024}')
    config = EngineConfig(max_model_len=100)
    assert fit_context(config, str(tmp_path)) is config
