"""Build a suite, train on it, evaluate the result, and use an environment as a plain Gymnasium one.

Without arguments it makes a small random model and takes two policy updates, enough to see every part at work in
about a minute: it learns nothing in two updates (`palaestra quickstart` does). With a model it is a real run:

    python examples/train.py --model Qwen/Qwen3-0.6B --form full --steps 200 --group-size 16
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import gymnasium

import palaestra as pl
from palaestra.agents import Sampling
from palaestra.trainer.demonstrations import collect, texts_of
from palaestra.trainer.tiny import make_model, make_tokenizer


def make_small_model(folder: Path, suite: pl.EnvSuite) -> Path:
    """A random model whose vocabulary comes from a few demonstrations of the suite's scripted experts."""
    demonstrations = asyncio.run(collect(suite, 30, skill=0.8, seed=0))
    make_tokenizer(texts_of(demonstrations), folder)
    return make_model(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face model or folder; by default a small random one")
    parser.add_argument("--form", choices=("compact", "full"), default="compact", help="how tasks are worded")
    parser.add_argument("--steps", type=int, default=2, help="policy updates")
    parser.add_argument("--group-size", type=int, default=4, help="episodes of each task")
    options = parser.parse_args()

    suite = pl.EnvSuite(
        {"palaestra/CodeRepair-v0": 2.0, "palaestra/MiniWoB-v0": 1.0, "palaestra/ToolDesk-v0": 1.0},
        form=options.form,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_small_model(Path(folder) / "small", suite)
        sampling = Sampling(max_tokens=512 if options.model else 64)  # random weights seldom say where they stop
        config = pl.GRPOConfig(
            steps=options.steps, group_size=options.group_size, groups_per_step=4, max_lag=1, sampling=sampling
        )
        trainer = pl.Trainer(model, config, run=Path(folder) / "run")
        trainer.fit(suite)
        report = pl.evaluate(trainer.policy, suite.split("test"), tasks=9, samples=2)
    for env_id, success in report.by_env.items():
        print(f"{env_id}: {success.rate:.0%} [{success.low:.0%}, {success.high:.0%}] of {success.count} episodes")

    env = gymnasium.make("palaestra/ToolDesk-v0")
    observation, _ = env.reset(seed=0)
    print(observation[-1].content)
    observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    print(observation[-1].content, reward, terminated, truncated)
    env.close()


if __name__ == "__main__":
    main()
