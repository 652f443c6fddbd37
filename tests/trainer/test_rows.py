"""Groups become rows: only valid siblings vote in a baseline."""

from __future__ import annotations

from dataclasses import replace

from palaestra.trainer.rows import make_rows, objection_to
from palaestra.types import Episode, Group, Outcome
from tests.trainer.test_fit import config
from tests.trainer.test_ledger import make_group


def sibling(position: int, outcome: Outcome, reward: float | None) -> Episode:
    episode = make_group(0).episodes[0]
    return replace(episode, id=f"0.{position}", outcome=outcome, reward=reward)


def test_only_valid_siblings_vote() -> None:
    rewards = (1.0, 0.0, 0.5, None, None)
    outcomes = (Outcome.SCORED, Outcome.TRUNCATED, Outcome.SCORED, Outcome.INFRA_ERROR, Outcome.TIMEOUT)
    siblings = tuple(sibling(k, *pair) for k, pair in enumerate(zip(outcomes, rewards, strict=True)))
    group = Group(id="0", task=make_group(0).task, episodes=siblings)
    assert [row.advantage for row in make_rows([group], config())] == [0.5, -0.5, 0.0]
    untruncated = make_rows([group], config(train_on_truncated=False))
    assert [row.advantage for row in untruncated] == [0.25, -0.25]


def test_group_without_a_baseline_is_refused() -> None:
    lonely = (sibling(0, Outcome.SCORED, 1.0), sibling(1, Outcome.INFRA_ERROR, None))
    group = Group(id="0", task=make_group(0).task, episodes=lonely)
    assert objection_to(group, config()) == "invalid"
    equal = Group(id="0", task=group.task, episodes=tuple(sibling(k, Outcome.SCORED, 1.0) for k in range(3)))
    assert objection_to(equal, config()) is None
    assert objection_to(equal, config(drop_zero_variance=True)) == "zero_variance"
