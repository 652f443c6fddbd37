"""Going on with a run: from the newest whole checkpoint, then every later step again from the ledger.

Invariant: the learner ends at the ledger's last step, having trained each recorded group once; nothing that was sampled
is sampled again. A checkpoint that cannot be used costs time, never work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from palaestra.errors import LedgerError
from palaestra.trainer.checkpoints import Checkpoints
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
    """A step made a second time: its trace as recorded, and as it came out now. None where there is no trace."""

    before: StepTrace | None
    now: StepTrace | None

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
    learner: Learner,
    config: LearnerConfig,
    *,
    open_learner: OpenLearner,
    say: Say,
) -> None:
    """Bring `learner`, which has `config`, to the ledger's last step; `say` hears of all that is not plain.

    Raises `LedgerError` when the ledger lost everything: to begin anew over a run's checkpoints would be an accident.
    """
    last = await ledger.last_step()
    if checkpoints.latest and await ledger.next_number() == 0:
        raise LedgerError(
            f"the ledger is empty, but there is a checkpoint of step {checkpoints.latest}: put the run's ledger.sqlite "
            "back (with its -wal file, where there is one), or choose another run folder"
        )
    checkpoint = await checkpoints.newest(last, on_damage=say)
    if checkpoint is not None:
        await learner.load(checkpoint)
    if learner.version == last:
        return
    start = f"checkpoint {checkpoint.name}" if checkpoint is not None else "the model the run began with"
    await say(f"making steps {learner.version + 1} to {last} again from the ledger, on {start}")
    here = {name: value for name, value in config.model_dump(mode="json").items() if name in _RESOURCES}
    recorded = [(step, await ledger.config_of(step)) for step in range(learner.version + 1, last + 1)]
    configs = [(step, {**values, "learner": {**values["learner"], **here}}) for step, values in recorded]
    for learner_config, steps in by_settings(configs):
        if learner_config == config:
            await _replay(ledger, learner, steps, say)
            continue
        await _replay_elsewhere(ledger, checkpoints, learner, steps, say, await open_learner(learner_config))
    await checkpoints.save(learner)


async def _replay_elsewhere(
    ledger: Ledger,
    checkpoints: Checkpoints,
    learner: Learner,
    steps: range,
    say: Say,
    other: Learner,
) -> None:
    """Steps that were made with other settings of the learner are made again with those."""
    try:
        if learner.version:
            await other.load(await checkpoints.save(learner))
        await _replay(ledger, other, steps, say)
        await learner.load(await checkpoints.save(other))
    finally:
        await other.aclose()


async def _replay(ledger: Ledger, learner: Learner, steps: range, say: Say) -> None:
    for step in steps:
        recorded = await ledger.load_step(step)
        again = await make_again(learner, recorded)
        if again.difference is not None:
            await say(
                f"step {step} came out otherwise ({again.difference}){again.reason}; the run goes on from these weights"
            )


async def make_again(learner: Learner, recorded: RecordedStep) -> Again:
    """Make a recorded step again, with a learner that is at the step before."""
    config = GRPOConfig.model_validate(recorded.config)
    report = await learner.step(make_rows([group for _, group in recorded.groups], config))
    before = StepTrace.from_bytes(recorded.trace) if recorded.trace is not None else None
    return Again(before=before, now=report.trace)


def by_settings(configs: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[LearnerConfig, range]]:
    """Consecutive steps, given with their configurations, by the learner's settings that made them."""
    for settings, members in groupby(configs, key=lambda each: each[1]["learner"]):
        steps = [step for step, _ in members]
        yield LearnerConfig.model_validate(settings), range(steps[0], steps[-1] + 1)
