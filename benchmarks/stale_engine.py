"""Would an engine that keeps its old weights be found? The weight sync against such engines; writes `stale_engine.md`.

    python benchmarks/stale_engine.py [--device gpu] [--out FILE]

For each learning rate an engine `transformers` and the learner sync for some steps on the same batch, once as they
should and once with an engine that says of every load that it was done, and does nothing: the checksum does not see
that. `--device cpu --hidden 64` tries the script itself.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from palaestra.agents import Engine
from palaestra.agents.engines import open_engine
from palaestra.errors import WorkerError
from palaestra.trainer import GRPOConfig, Trainer
from palaestra.trainer.batch import TrainRow
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.ledger import read_step
from palaestra.trainer.rows import make_rows
from palaestra.trainer.sync import WeightSync
from palaestra.trainer.trainer import BEFORE_FIRST_WEIGHTS

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # last, so that the folders of the repository hide nobody's modules

from benchmarks._gpu_model import size_of  # noqa: E402

from tests.chaos.errand import errands  # noqa: E402
from tests.chaos.walker import make_walker  # noqa: E402

RATES = (1e-7, 1e-6, 1e-5)
MOST_STEPS = 16
NUM_CANARIES = 2


@dataclass
class Trial:
    """How one pair of engine and learner went."""

    rate: float
    is_stale: bool
    moved: list[float] = field(default_factory=list)
    """Mean change of the learner's log-probabilities by each step, in nats."""
    noise: float = 0.0
    """Mean difference of engine and learner on equal weights, in nats."""
    refusal: str | None = None


class Keeper:
    """An engine whose loads change the version and nothing else."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def load_weights(self, folder: Path, version: int, checksum: str | None = None) -> None:
        """Say that it was done."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, which has 12 layers")
    parser.add_argument("--out", type=Path, default=HERE / "stale_engine.md")
    options = parser.parse_args()
    is_gpu = options.device == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        size = size_of(options.hidden)
        model = make_walker(Path(folder) / "model", size, device="cuda" if is_gpu else "cpu", rate=3e-4)
        num_parameters = sum(path.stat().st_size for path in model.glob("*.safetensors")) // 4
        settings = config(options.device)
        Trainer(model, settings, run=Path(folder) / "run").fit(errands())
        rows = make_rows([group for _, group in read_step(Path(folder) / "run", 1).groups], settings)
        name = torch.cuda.get_device_name() if is_gpu else "a CPU, in float32"

        def keep(trials: Sequence[Trial]) -> None:
            options.out.write_text(page(trials, name, num_parameters))

        asyncio.run(try_all(model, settings, rows, keep))


def config(device: str) -> GRPOConfig:
    """One step of sixteen groups of eight, to have a batch."""
    return GRPOConfig.parse(
        {
            "steps": 1,
            "mode": "sync",
            "group_size": 8,
            "groups_per_step": 16,
            "concurrency": 128,
            "engine": "transformers",
            "engine_config": {"max_model_len": 256, "max_num_seqs": 128, "device": device},
            "learner": {"learning_rate": 1e-5, "max_micro_batch_tokens": 16384, "device": device},
            "sampling": {"max_tokens": 16},
        }
    )


async def try_all(
    model: Path, settings: GRPOConfig, rows: Sequence[TrainRow], keep: Callable[[Sequence[Trial]], None]
) -> None:
    """Every rate, with an engine that loads and one that does not; what is there is kept after each."""
    trials: list[Trial] = []
    for rate in RATES:
        for is_stale in (False, True):
            trial = Trial(rate=rate, is_stale=is_stale)
            await try_one(model, settings, rows, trial)
            trials.append(trial)
            print(trial, flush=True)
            keep(trials)


async def try_one(model: Path, settings: GRPOConfig, rows: Sequence[TrainRow], trial: Trial) -> None:
    """Step and sync until the sync refuses, or `MOST_STEPS` times."""
    sequences = [row.trajectory.ids.tolist() for row in rows[:NUM_CANARIES]]
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learner_config = settings.learner.model_copy(update={"learning_rate": trial.rate})
        async with asyncio.TaskGroup() as tasks:
            starting = tasks.create_task(LocalLearner.start(model, learner_config, scratch / "l"))
            opening = tasks.create_task(
                open_engine(
                    "transformers", model, settings.engine_settings, scratch / "e", version=BEFORE_FIRST_WEIGHTS
                )
            )
        learner = await stack.enter_async_context(starting.result())
        real = await stack.enter_async_context(opening.result())
        engine: Any = Keeper(real) if trial.is_stale else real
        sync = WeightSync(learner, engine, tolerance=settings.canary_tolerance, canary_every=1)
        await stack.enter_async_context(sync)
        await sync.prepare(sequences)
        await sync.publish(learner.version)
        old = await learner.score(sequences)
        trial.noise = distance(await engine.score(sequences), old)
        for _ in range(MOST_STEPS):
            await sync.prepare(sequences)
            await learner.step(rows)
            new = await learner.score(sequences)
            trial.moved.append(distance(new, old))
            old = new
            try:
                await sync.publish(learner.version)
            except WorkerError as error:
                trial.refusal = str(error)
                return


def distance(left: list[NDArray[np.float32]], right: list[NDArray[np.float32]]) -> float:
    """Mean absolute difference, in nats."""
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def page(trials: Sequence[Trial], device: str, num_parameters: int) -> str:
    """The report; every sentence follows from the figures."""
    lines = [
        "# Would an engine that keeps its old weights be found?",
        "",
        f"Made on {date.today()} by `python benchmarks/stale_engine.py` on {device}, torch {torch.__version__}, with a "
        f"model of {num_parameters / 1e6:.1f} million parameters, engine `transformers` and one learner, which step on "
        f"one batch up to {MOST_STEPS} times. The stale engine says of every load that it was done and does nothing; "
        "no checksum sees that.",
        "",
        "*Moved* is the mean change of log-probabilities by the first step, *disagreement* that of engine and learner "
        "on equal weights, both in nats.",
        "",
        "| learning rate | engine | moved | disagreement | syncs until it was refused | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trial in trials:
        kind = "stale" if trial.is_stale else "healthy"
        count = f"{len(trial.moved)}" if trial.refusal is not None else f"not in {len(trial.moved)}"
        why = trial.refusal.partition(": ")[2] if trial.refusal is not None else ""
        lines.append(f"| {trial.rate:g} | {kind} | {trial.moved[0]:.2g} | {trial.noise:.2g} | {count} | {why} |")
    missing = [rate for rate in RATES if not any(trial.rate == rate and trial.is_stale for trial in trials)]
    if missing:
        lines += ["", f"Not measured in the time there was: {', '.join(f'{rate:g}' for rate in missing)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
