"""The start policy of every run: a small model that imitated sloppy experts, made once.

Invariant: `start_policy` gives a model whose gate was passed, or raises; an interrupted one is made again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError
from palaestra.records import write_whole
from palaestra.resources import Resources
from palaestra.trainer.progress import Display
from palaestra.trainer.quickstart._config import QuickstartConfig
from palaestra.trainer.quickstart._folder import RunFolder
from palaestra.trainer.quickstart._warm_up import gather_corpus, imitate, make_base

_DESK = "palaestra/ToolDesk-v0"
LOWEST, HIGHEST = 0.2, 0.6
"""Held-out success that leaves something to learn, and something to learn from."""


async def start_policy(path: Path, display: Display) -> tuple[Path, str]:
    """The model's folder and a sentence about how it was made; imitates where that is not done yet."""
    folder = RunFolder(path)
    note = path / "note.txt"
    if not note.is_file():
        shutil.rmtree(path, ignore_errors=True)
        folder.logs.mkdir(parents=True)
        write_whole(note, await _make(folder, display))
    return folder.sft, note.read_text()


async def _make(folder: RunFolder, display: Display) -> str:
    config = QuickstartConfig(weights={_DESK: 1.0}, options={}, num_demonstrations=2000)
    suite = EnvSuite(config.weights, form=config.form)
    async with Resources() as resources:
        corpus = await gather_corpus(config, suite, resources, display)
    model = make_base(config, folder, corpus)
    imitation = await imitate(config, folder, corpus, display)
    if "NOT passed" in imitation:
        raise ConfigError(f"the start policy did not learn to imitate: {imitation}")
    return f"{model}; {corpus.describe()}; {imitation}"


def check_start(rate: float) -> None:
    """Raise `ConfigError` when the start policy's held-out success is outside what a comparison needs."""
    if not LOWEST <= rate <= HIGHEST:
        raise ConfigError(f"the start policy solves {rate:.1%}, not {LOWEST:.0%} to {HIGHEST:.0%}: change its skill")
