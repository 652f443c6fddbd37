"""Going on with a run: from the newest whole checkpoint, then every later step again from the ledger.

Invariant: the learner ends at the ledger's last step, having trained each recorded group once; nothing that was sampled
is sampled again. A checkpoint that cannot be used costs time, never work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from itertools import groupby
from typing import Any

from palaestra.errors import LedgerError
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.learner import Learner, LearnerConfig
from palaestra.trainer.ledger import Ledger, RecordedStep
from palaestra.trainer.rows import make_rows
from palaestra.trainer.trace import StepTrace

OpenLearner = Callable[[LearnerConfig], Awaitable[Learner]]
"""Starts a learner with the run's model; whoever asks closes it."""


async def resume(
    ledger: Ledger,
    checkpoints: Checkpoints,
    learner: Learner,
    config: LearnerConfig,
    *,
    open_learner: OpenLearner,
    say: Callable[[str], None],
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
    say(f"making steps {learner.version + 1} to {last} again from the ledger, on {start}")
    for learner_config, steps in await _segments(ledger, learner.version + 1, last):
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
    say: Callable[[str], None],
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


async def _replay(ledger: Ledger, learner: Learner, steps: range, say: Callable[[str], None]) -> None:
    for step in steps:
        recorded = await ledger.load_step(step)
        difference = await replay_step(learner, recorded)
        if difference is not None:
            line = (
                f"step {step} came out otherwise than the first time ({difference}): another device, thread count or "
                "library; the run goes on from these weights"
            )
            say(line)
            await ledger.note(line)


async def replay_step(learner: Learner, recorded: RecordedStep) -> str | None:
    """Make a recorded step again; the first thing that came out otherwise, None when all bits agree."""
    config = GRPOConfig.model_validate(recorded.config)
    report = await learner.step(make_rows([group for _, group in recorded.groups], config))
    if recorded.trace is None or report.trace is None:
        return None
    return StepTrace.from_bytes(recorded.trace).difference(report.trace)


async def _segments(ledger: Ledger, first: int, last: int) -> list[tuple[LearnerConfig, range]]:
    """The steps by the learner's settings that made them."""
    configs = [(step, await ledger.config_of(step)) for step in range(first, last + 1)]
    return list(_grouped(configs))


def _grouped(configs: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[LearnerConfig, range]]:
    for settings, members in groupby(configs, key=lambda each: each[1]["learner"]):
        steps = [step for step, _ in members]
        yield LearnerConfig.model_validate(settings), range(steps[0], steps[-1] + 1)
