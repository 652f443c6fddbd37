"""The kill switch: which outcomes count, from when on, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from palaestra.errors import WorkerError
from palaestra.trainer._failure_watch import FailureWatch
from palaestra.types import Episode, Failure, Outcome
from tests.trainer.test_ledger import make_group

WINDOW = 8
VALID = (Outcome.SCORED, Outcome.TRUNCATED)


def episode(outcome: Outcome) -> Episode:
    failure = Failure(kind="SandboxError", message="no box", boundary="env") if outcome not in VALID else None
    return replace(
        make_group(0).episodes[0], outcome=outcome, reward=1.0 if outcome in VALID else None, failure=failure
    )


def watch(*, failed: float = 0.25, invalid: float = 0.5) -> FailureWatch:
    return FailureWatch(failed, invalid, is_valid=VALID.__contains__, window=WINDOW)


def show(seen: FailureWatch, outcome: Outcome, count: int) -> None:
    for _ in range(count):
        seen.see(episode(outcome))


@pytest.mark.parametrize("outcome", [Outcome.INFRA_ERROR, Outcome.UNSCORABLE])
def test_one_failure_more_than_allowed_stops_and_tells_the_commonest(outcome: Outcome) -> None:
    seen = watch()
    show(seen, outcome, 2)
    show(seen, Outcome.SCORED, WINDOW - 2)
    show(seen, outcome, 2)  # two of the eight, since the two older ones have left
    with pytest.raises(WorkerError, match=r"3 of the last 8 episodes failed on our side.*SandboxError: no box"):
        show(seen, outcome, 1)


def test_nothing_is_said_before_a_full_window() -> None:
    seen = watch()
    show(seen, Outcome.INFRA_ERROR, WINDOW - 1)
    with pytest.raises(WorkerError, match="8 of the last 8"):
        show(seen, Outcome.INFRA_ERROR, 1)


def test_timeouts_are_no_failures_of_ours_but_too_many_leave_no_fair_sample() -> None:
    seen = watch()
    show(seen, Outcome.SCORED, 4)
    show(seen, Outcome.TIMEOUT, 4)
    with pytest.raises(WorkerError, match=r"5 of the last 8 episodes got no advantage \(5 timeout\).*max_invalid_rate"):
        show(seen, Outcome.TIMEOUT, 1)


def test_episodes_that_were_late_are_no_failures_of_ours_but_got_no_advantage() -> None:
    seen = watch(failed=0.0)
    show(seen, Outcome.SCORED, 4)
    show(seen, Outcome.CANCELLED, 4)
    with pytest.raises(WorkerError, match=r"5 of the last 8 episodes got no advantage \(5 late\)"):
        show(seen, Outcome.CANCELLED, 1)


def test_a_rate_of_one_never_stops() -> None:
    seen = watch(failed=1.0, invalid=1.0)
    show(seen, Outcome.INFRA_ERROR, 3 * WINDOW)
