"""Going on with a run: from the newest whole checkpoint, then every later step again from the ledger.

Invariant: the learner ends at the ledger's last step, having trained each recorded group once; nothing that was sampled
is sampled again. A checkpoint that cannot be used costs time, never work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from palaestra.errors import ConfigError, LedgerError, StepRefusedError, WorkerError
from palaestra.trainer.checkpoints import Checkpoints, version_of
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import Learner, LearnerConfig
from palaestra.trainer.ledger import Ledger, RecordedStep
from palaestra.trainer.rows import make_rows
from palaestra.trainer.trace import StepTrace

_RESOURCES = ("device", "threads", "precision", "max_micro_batch_tokens", "start_timeout_s", "call_timeout_s")
"""What computes a step and not what is computed: steps are made again with what this machine has now."""

Say = Callable[[str], Awaitable[None]]
"""Tells a person, and notes in the ledger, what is not plain, in one line."""
OpenLearner = Callable[[LearnerConfig], Awaitable[Learner]]
"""Starts a learner with the run's model; whoever asks closes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """A step made a second time: its trace as recorded, and as it came out now. None where there is no trace.

    `damage` says why the recorded one cannot be read.
    """

    before: StepTrace | None
    now: StepTrace | None
    damage: str | None = None

    @property
    def difference(self) -> str | None:
        """The first thing that came out otherwise; None when all bits agree, or there is nothing to compare."""
        return None if self.before is None or self.now is None else self.before.difference(self.now)

    @property
    def reason(self) -> str:
        """Why that may be, where the two were made on different machines."""
        if self.before is None or self.now is None or self.before.made_on == self.now.made_on:
            return ""
        return f": it was made on {self.before.made_on}, now on {self.now.made_on}"


async def resume(
    ledger: Ledger,
    checkpoints: Checkpoints,
    config: LearnerConfig,
    *,
    save_every: int,
    open_learner: OpenLearner,
    say: Say,
) -> Learner:
    """A learner with `config` at the ledger's last step, for the caller to close; `say` hears of all that is not plain.

    There is one learner at a time, and a checkpoint at each step that `save_every` divides. Raises `LedgerError` when
    the ledger lost everything: to begin anew over a run's checkpoints would be an accident.
    """
    last = await ledger.last_step()
    if checkpoints.latest and await ledger.next_number() == 0:
        raise LedgerError(
            f"the ledger is empty, but there is a checkpoint of step {checkpoints.latest}: put the run's ledger.sqlite "
            "back (with its -wal file, where there is one), or choose another run folder"
        )
    checkpoint = await checkpoints.newest(last, on_damage=say)
    start = version_of(checkpoint) if checkpoint is not None else 0
    seat = _Seat(checkpoints, open_learner)
    try:
        learner = await seat.take(await _settings_after(ledger, start, last, config))
        while checkpoint is not None and not await _is_loaded(learner, checkpoints, checkpoint, say):
            checkpoint = await checkpoints.newest(last, on_damage=say)
        num_made = last - learner.version
        if num_made:
            on = f"checkpoint {checkpoint.name}" if checkpoint is not None else "the model the run began with"
            await say(f"making steps {learner.version + 1} to {last} again from the ledger, on {on}")
        for settings, steps in await _blocks(ledger, range(learner.version + 1, last + 1), config):
            learner = await seat.take(settings)
            for step in steps:
                await _replay(ledger, learner, step, say)
                if step % save_every == 0:
                    await checkpoints.save(learner)
        learner = await seat.take(config)
        if num_made:
            await checkpoints.save(learner)
    except BaseException:
        await seat.clear()
        raise
    return learner


class _Seat:
    """Room for one learner: memory holds no second. The next one goes on where the last one was."""

    def __init__(self, checkpoints: Checkpoints, open_learner: OpenLearner) -> None:
        self._checkpoints = checkpoints
        self._open_learner = open_learner
        self._learner: Learner | None = None
        self._settings: LearnerConfig | None = None

    async def take(self, settings: LearnerConfig) -> Learner:
        """The learner with these settings, at the version that was reached."""
        if self._learner is not None and self._settings == settings:
            return self._learner
        reached = await self._checkpoints.save(self._learner) if self._learner and self._learner.version else None
        await self.clear()
        self._learner, self._settings = await self._open_learner(settings), settings
        if reached is not None:
            await self._learner.load(reached)
        return self._learner

    async def clear(self) -> None:
        """Close the learner that sits here, if any."""
        learner, self._learner = self._learner, None
        if learner is not None:
            await learner.aclose()


async def _is_loaded(learner: Learner, checkpoints: Checkpoints, checkpoint: Path, say: Say) -> bool:
    """Whether a checkpoint could be loaded; one that could not is set aside, and the learner is as it was."""
    try:
        await learner.load(checkpoint)
    except ConfigError as error:
        await checkpoints.set_aside(checkpoint, str(error), on_damage=say)
        return False
    return True


async def _settings_after(ledger: Ledger, start: int, last: int, config: LearnerConfig) -> LearnerConfig:
    """What the step after `start` was made with, on this machine; `config` where there is none."""
    blocks = await _blocks(ledger, range(start + 1, min(start + 1, last) + 1), config)
    return blocks[0][0] if blocks else config


async def _blocks(ledger: Ledger, steps: range, config: LearnerConfig) -> list[tuple[LearnerConfig, range]]:
    """Steps by the settings that made them, with the resources of `config`."""
    here = {name: value for name, value in config.model_dump(mode="json").items() if name in _RESOURCES}
    recorded = [(step, await ledger.config_of(step)) for step in steps]
    return list(by_settings((step, {**values, "learner": {**values["learner"], **here}}) for step, values in recorded))


async def _replay(ledger: Ledger, learner: Learner, step: int, say: Say) -> None:
    try:
        again = await make_again(learner, await ledger.load_step(step))
    except StepRefusedError as error:
        raise WorkerError(
            f"step {step} is on record, and now the learner refuses it ({error}): go on where it was made, with the "
            "device and precision of then"
        ) from error
    if again.damage is not None:
        await say(f"step {step} was made again, and cannot be compared: its trace is damaged ({again.damage})")
    if again.difference is not None:
        await say(
            f"step {step} came out otherwise ({again.difference}){again.reason}; the run goes on from these weights"
        )


async def make_again(learner: Learner, recorded: RecordedStep) -> Again:
    """Make a recorded step again, with a learner that is at the step before."""
    config = GRPOConfig.parse(recorded.config, source=_source_of(recorded.step))
    report = await learner.step(make_rows([group for _, group in recorded.groups], config))
    before, damage = None, None
    try:
        before = StepTrace.from_bytes(recorded.trace) if recorded.trace is not None else None
    except ValueError as error:
        damage = str(error)
    return Again(before=before, now=report.trace, damage=damage)


def by_settings(configs: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[LearnerConfig, range]]:
    """Consecutive steps, given with their configurations, by the learner's settings that made them."""
    for settings, members in groupby(configs, key=lambda each: each[1]["learner"]):
        steps = [step for step, _ in members]
        yield LearnerConfig.parse(settings, source=_source_of(steps[0])), range(steps[0], steps[-1] + 1)


def _source_of(step: int) -> str:
    return f"the configuration on record of step {step}"
