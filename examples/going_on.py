"""Kill a run without warning, go on with it, and make one of its steps again: nothing that was sampled is lost.

A child process trains a small random model in mode `sync` with the Transformers engine, is killed with SIGKILL, and is
started again in the same folder. Then a step is made once more from the ledger, and compared bit for bit.

    python examples/going_on.py
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import palaestra as pl
from palaestra.agents import Sampling
from palaestra.agents.engines import EngineConfig
from palaestra.trainer.demonstrations import collect, texts_of
from palaestra.trainer.ledger import read_records
from palaestra.trainer.metrics import StepRecord
from palaestra.trainer.replay import replay
from palaestra.trainer.tiny import make_model, make_tokenizer

STEPS = 3


def make_suite() -> pl.EnvSuite:
    return pl.EnvSuite({"palaestra/ToolDesk-v0": 1.0}, form="compact")


def train(model: Path, run: Path, killed_after: int) -> None:
    """Fit to the end, or until an update after which this process kills itself."""

    def on_step(record: StepRecord) -> None:
        print(f"update {record.step}: {record.generated} episodes so far", flush=True)
        if record.step == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)

    config = pl.GRPOConfig(
        steps=STEPS,
        mode="sync",
        engine="transformers",
        group_size=4,
        groups_per_step=2,
        sampling=Sampling(max_tokens=16),
        engine_config=EngineConfig(max_model_len=256),
    )
    pl.Trainer(model, config, run=run, on_step=on_step, on_note=print).fit(make_suite())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, run = Path(folder) / "small", Path(folder) / "run"
        demonstrations = asyncio.run(collect(make_suite(), 30, skill=0.8, seed=0))
        make_tokenizer(texts_of(demonstrations), model)
        make_model(model)
        context = multiprocessing.get_context("spawn")
        for killed_after in (2, 0):
            life = context.Process(target=train, args=(model, run, killed_after))
            life.start()
            life.join()
            episodes = sum(1 for _ in read_records(run))
            print(f"the process ended with {life.exitcode}; {episodes} episodes are on record")
        found = asyncio.run(replay(run, STEPS - 1, model=None, say=print))
        print(found.describe())


if __name__ == "__main__":
    main()
