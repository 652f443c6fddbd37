"""Replay: makes one step of a run again from its ledger, on a CPU, and compares loss and gradients bit for bit.

Invariant: the run's folder is only read, so a run that is going on can be replayed, and one on a read-only disk.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from palaestra.errors import ConfigError
from palaestra.trainer import _ledger_store as store
from palaestra.trainer._ledger_reader import LedgerReader
from palaestra.trainer._model_identity import identity_beside, identity_of
from palaestra.trainer.checkpoints import Checkpoints, version_of
from palaestra.trainer.learner import LearnerConfig, LocalLearner
from palaestra.trainer.ledger import reading
from palaestra.trainer.resume import Again, by_settings, make_again

_MAX_TRIES = 3
"""A run that goes on may thin out the checkpoint that was found, while the learner's process starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay found: the step, the version it began at, and both traces."""

    step: int
    start: int
    again: Again

    @property
    def is_compared(self) -> bool:
        """Whether there were two traces to compare."""
        return self.again.before is not None and self.again.now is not None

    @property
    def is_equal(self) -> bool:
        """Whether loss and gradients came out equal, to the last bit."""
        return self.is_compared and self.again.difference is None

    def describe(self) -> str:
        """One line for a person."""
        before, now = self.again.before, self.again.now
        if self.again.damage is not None:
            return f"step {self.step} cannot be compared: its trace on record is damaged ({self.again.damage})"
        if before is None or now is None:
            return f"step {self.step} has no trace on record: there is nothing to compare with"
        if self.again.difference is not None:
            return f"step {self.step} DIFFERS: {self.again.difference}{self.again.reason}"
        losses = ", ".join(f"{loss:.6g}" for loss in now.losses)
        num_gradients = now.fingerprints.shape[0] * len(now.names)
        gradients = f"{num_gradients} gradients"
        if now.is_zero:
            gradients = f"all {num_gradients} gradients are zero, so that their agreement proves little"
        return f"step {self.step} came out as recorded, bit for bit: loss {losses}, {gradients}, made on {now.made_on}"


def run_folder(path: Path) -> Path:
    """The folder of a fit: `path`, or the one inside the folder of a quickstart."""
    inner = path / "rl"
    return inner if not (path / "ledger.sqlite").exists() and (inner / "ledger.sqlite").exists() else path


async def replay(run: Path, step: int, *, model: str | None, say: Callable[[str], None]) -> Replay:
    """Make a step again, from the newest whole checkpoint before it, or from the model the run began with.

    `model` tells where that model is now, if it was moved. `say` hears of steps on the way that came out otherwise.
    Raises `LedgerError` when there is no such step or a byte of it changed, `ConfigError` for another model.
    """
    with reading(run) as ledger:
        await asyncio.to_thread(ledger.ask, store.load_step, step)
        meta = await asyncio.to_thread(ledger.ask, store.meta)
        source = model if model is not None else await asyncio.to_thread(_recorded_model, run)
        await asyncio.to_thread(_check_model, ledger, source, is_here=model is not None)
        find = partial(Checkpoints(run / "checkpoints", run=meta["run"]).find, step - 1)
        found, num_tries = await asyncio.to_thread(find), 1
        while True:
            try:
                return await _replay_from(found, ledger, step, source, say)
            except _UnloadableError:
                gone, found, num_tries = found, await asyncio.to_thread(find), num_tries + 1
                if found == gone or num_tries > _MAX_TRIES:
                    raise


class _UnloadableError(ConfigError):
    """A checkpoint that was whole when it was found does not load."""


async def _replay_from(
    checkpoint: Path | None, ledger: LedgerReader, step: int, model: str, say: Callable[[str], None]
) -> Replay:
    start = version_of(checkpoint) if checkpoint is not None else 0
    configs = await asyncio.to_thread(ledger.ask, store.configs_of, range(start + 1, step + 1))
    scratch = Path(tempfile.mkdtemp(prefix="palaestra-replay-"))
    try:
        for number, (config, steps) in enumerate(by_settings(configs)):
            async with await _open(model, config, scratch / "learner.log") as learner:
                await asyncio.to_thread(_check_model, ledger, model)
                if checkpoint is not None:
                    await _load(learner, checkpoint)
                again = await _make_all(ledger, learner, steps, step, say)
                if steps[-1] < step:
                    checkpoint = scratch / f"after-{number}"
                    await learner.save(checkpoint)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
    return Replay(step=step, start=start, again=again)


def _check_model(ledger: LedgerReader, model: str, *, is_here: bool = False) -> None:
    """Raise `ConfigError` for another model, before and after the learner has fetched what a hub name stands for.

    Whoever says where the model is (`is_here`) names no other one that is yet to be fetched.
    """
    recorded = ledger.ask(store.meta)["model"]
    now = identity_of(model) if is_here and recorded != model else identity_beside(recorded, model)
    if now != recorded:
        raise ConfigError(f"{model} is not the model that the run began with; say where that is with --model")


async def _load(learner: LocalLearner, checkpoint: Path) -> None:
    try:
        await learner.load(checkpoint)
    except ConfigError as error:
        raise _UnloadableError(str(error)) from error


async def _make_all(
    ledger: LedgerReader, learner: LocalLearner, steps: range, wanted: int, say: Callable[[str], None]
) -> Again:
    for each in steps:
        again = await make_again(learner, await asyncio.to_thread(ledger.ask, store.load_step, each))
        if each != wanted and again.damage is not None:
            say(f"on the way, step {each} cannot be compared: its trace on record is damaged ({again.damage})")
        if each != wanted and again.difference is not None:
            say(f"on the way, step {each} came out otherwise ({again.difference}){again.reason}")
    return again


async def _open(model: str, config: LearnerConfig, log_path: Path) -> LocalLearner:
    return await LocalLearner.start(model, config.model_copy(update={"device": "cpu"}), log_path=log_path)


def _recorded_model(run: Path) -> str:
    try:
        return str(json.loads((run / "config.json").read_text())["model"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{run} does not say which model it trains; give it with --model") from error
