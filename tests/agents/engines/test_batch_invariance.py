"""The Transformers engine, each sequence by itself: no bit of a completion depends on its neighbours."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from palaestra.agents import Completion, Sampling
from palaestra.agents.engines import EngineConfig, open_engine
from tests.agents.engines.conftest import MAX_MODEL_LEN, VOCAB_SIZE, TinyModel, require_library

pytestmark = pytest.mark.slow


async def test_neighbours_change_no_bit(model_a: TinyModel, tmp_path: Path) -> None:
    require_library("transformers")
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN, max_num_seqs=5, dtype="float32", device="cpu", batch_invariant="always"
    )
    prompts = [np.random.default_rng(k).integers(2, VOCAB_SIZE, 3 + 9 * k).tolist() for k in range(7)]
    async with await open_engine("transformers", model_a.folder, config, tmp_path / "log") as engine:

        async def sample(index: int) -> Completion:
            return await engine.generate(prompts[index], Sampling(max_tokens=12), stop_ids=[], seed=index)

        alone = [await sample(index) for index in range(len(prompts))]
        scored_alone = [(await engine.score([prompt]))[0] for prompt in prompts]
        async with asyncio.TaskGroup() as tasks:
            together = [tasks.create_task(sample(index)) for index in range(len(prompts))]
        scored_together = await engine.score(prompts)
    for single, task in zip(alone, together, strict=True):
        assert single.ids.tolist() == task.result().ids.tolist()
        assert single.logprobs.tobytes() == task.result().logprobs.tobytes()
    for left, right in zip(scored_alone, scored_together, strict=True):
        assert left.tobytes() == right.tobytes()
