"""The trainer on one GPU: a killed run goes on, a step made again, the cost of the proofs; writes `gpu_trainer.md`.

    python benchmarks/gpu_trainer.py [--device gpu] [--out FILE]

Engine `transformers` and the learner share the device. The environment is the errand of `tests/chaos`, whose reward
depends on what the model samples. `--device cpu --hidden 64` tries the script itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from palaestra.trainer import GRPOConfig, Trainer
from palaestra.trainer._fingerprint import fingerprints
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.ledger import read_meta, read_step
from palaestra.trainer.metrics import StepRecord
from palaestra.trainer.replay import replay
from palaestra.trainer.resume import make_again

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # last, so that the folders of the repository hide nobody's modules

from benchmarks._gpu_model import size_of  # noqa: E402

from tests.chaos.errand import errands  # noqa: E402
from tests.chaos.walker import make_walker  # noqa: E402

STEPS, KILLED_AFTER, SAVE_EVERY = 12, 8, 5
NUM_GRADIENTS, GRADIENT_SIZE = 25, 20_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, which has 12 layers")
    parser.add_argument("--out", type=Path, default=HERE / "gpu_trainer.md")
    parser.add_argument("--life", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life is not None:
        model, run = options.life
        live(model, run, options.device)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = size_of(options.hidden)
        model = make_walker(
            Path(folder) / "model", size, device="cuda" if options.device == "gpu" else "cpu", rate=3e-4
        )
        values = measure(model, Path(folder) / "run", options.device)
    print(json.dumps(values, indent=2), flush=True)
    options.out.write_text(page(values))


def config(device: str) -> GRPOConfig:
    """Asynchronous, lag at most 1, sixteen groups of eight."""
    return GRPOConfig.parse(
        {
            "steps": STEPS,
            "max_lag": 1,
            "group_size": 8,
            "groups_per_step": 16,
            "concurrency": 128,
            "save_every": SAVE_EVERY,
            "engine": "transformers",
            "engine_config": {"max_model_len": 256, "max_num_seqs": 128, "device": device},
            "learner": {"learning_rate": 1e-5, "max_micro_batch_tokens": 16384, "device": device},
            "sampling": {"max_tokens": 16},
        }
    )


def live(model: Path, run: Path, device: str) -> None:
    """One life of the run; the first one kills itself."""
    is_first = not run.exists()

    def on_step(record: StepRecord) -> None:
        print(f"step {record.step} {record.wall_s:.2f} s, canary {record.canary}", flush=True)
        if is_first and record.step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_note(line: str) -> None:
        print(f"note {line}", flush=True)

    Trainer(model, config(device), run=run, on_step=on_step, on_note=on_note).fit(errands())


def measure(model: Path, run: Path, device: str) -> dict[str, Any]:
    """Everything, in the order of the page."""
    lives = [play(model, run, device) for _ in range(2)]
    values: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "gpu" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(path.stat().st_size for path in model.glob("*.safetensors")) // 4,
        "lives": lives,
    }
    values |= asyncio.run(step_again(model, run, device))
    values["fingerprint_ms"] = fingerprint_cost(device)
    return values


def play(model: Path, run: Path, device: str) -> dict[str, Any]:
    """A life in a process of its own: how it ended, its steps' seconds, canaries, and what it said."""
    command = [sys.executable, "-P", __file__, "--device", device, "--life", str(model), str(run)]
    started_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    lines = done.stdout.splitlines()
    steps = [line.split() for line in lines if line.startswith("step ")]
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(done.stdout + done.stderr)
    return {
        "exit": done.returncode,
        "wall_s": time.monotonic() - started_s,
        "steps": [int(words[1]) for words in steps],
        "step_s": [float(words[2]) for words in steps],
        "canary": [float(words[5]) for words in steps],
        "notes": [line.removeprefix("note ") for line in lines if line.startswith("note ")],
    }


async def step_again(model: Path, run: Path, device: str) -> dict[str, Any]:
    """The last step again, twice on the device it was made on, and once by `replay`, which uses the CPU."""
    checkpoint = Checkpoints(run / "checkpoints", run=read_meta(run)["run"], kept=9).find(STEPS - 1)
    assert checkpoint is not None
    differences, seconds = [], []
    for _ in range(2):
        async with await LocalLearner.start(model, config(device).learner, log_path=run / "again.log") as learner:
            await learner.load(checkpoint)
            for step in range(learner.version + 1, STEPS + 1):
                started_s = time.monotonic()
                again = await make_again(learner, read_step(run, step))
                seconds.append(time.monotonic() - started_s)
            differences.append(again.difference or "none: equal bit for bit")
    found = await replay(run, STEPS, model=str(model), say=lambda line: print(line, flush=True))
    return {"again": differences, "again_s": seconds, "on_cpu": found.describe()}


def fingerprint_cost(device: str) -> float:
    """Median milliseconds for the gradients of a model of half a billion parameters (a fiftieth of that on a CPU)."""
    where = "cuda" if device == "gpu" else "cpu"
    size = GRADIENT_SIZE if device == "gpu" else GRADIENT_SIZE // 50
    tensors = [torch.randn(size, device=where) for _ in range(NUM_GRADIENTS)]
    times = []
    for _ in range(7):
        started_s = time.perf_counter()
        fingerprints(tensors)
        times.append(time.perf_counter() - started_s)
    return 1000 * statistics.median(times)


def page(values: dict[str, Any]) -> str:
    """The report; every sentence follows from the figures."""
    first, second = values["lives"]
    lines = [
        "# The trainer on one GPU, measured",
        "",
        f"Made on {date.today()} by `python benchmarks/gpu_trainer.py` on {values['device']}, torch {values['torch']}, "
        f"with a model of {values['parameters'] / 1e6:.0f} million parameters; engine `transformers` in bfloat16 and "
        "the learner share the device. Not vLLM: its GPU build was not to be had there.",
        "",
        "## A killed run goes on",
        "",
        "| life | ended | steps | seconds a step, median | largest canary, nats | wall clock, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, life in (("first", first), ("second", second)):
        ended = "SIGKILL" if life["exit"] else "done"
        lines.append(
            f"| {name} | {ended} | {life['steps'][0]} to {life['steps'][-1]} | "
            f"{statistics.median(life['step_s']):.2f} | {max(life['canary']):.2g} | {life['wall_s']:.1f} |"
        )
    lines += ["", "The second life said:", "", *(f"- {line}" for line in second["notes"]), ""]
    lines += ["## The last step again", ""]
    lines += [f"- on the same device, try {k + 1}: {text}" for k, text in enumerate(values["again"])]
    lines += [f"- by `palaestra replay`, on the CPU: {values['on_cpu']}", ""]
    lines += [f"A step made again took {statistics.median(values['again_s']):.2f} s (median).", ""]
    count = NUM_GRADIENTS * GRADIENT_SIZE / 1e6
    lines += [
        "",
        f"Fingerprints of {count:.0f} million gradients: {values['fingerprint_ms']:.1f} ms (median of 7).",
        "",
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
