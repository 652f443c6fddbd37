"""Rules about groups, episodes, environments, and what is done every so many steps."""

from __future__ import annotations

import math

from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._rules import Hint, rule
from palaestra.trainer.doctor._subject import Subject

_CROWD = 4
_NEARLY_GREEDY = 0.3


@rule
def more_episodes_at_once_than_are_in_hand(subject: Subject, machine: Machine) -> Hint | None:
    """Groups are issued only as the lag allows."""
    train = subject.train
    in_hand = train.group_size * train.groups_per_step * (train.max_lag + 1)
    if train.concurrency <= in_hand or not subject.chose("concurrency"):
        return None
    detail = (
        f"concurrency {train.concurrency} is never reached: with max_lag {train.max_lag} at most {in_hand} episodes "
        f"({train.groups_per_step} groups of {train.group_size}, {train.max_lag + 1} times) are in hand"
    )
    return Hint(detail, f"set {subject.prefix}concurrency to {in_hand}, or raise groups_per_step")


@rule
def many_more_episodes_than_the_engine_takes(subject: Subject, machine: Machine) -> Hint | None:
    """They hold environments while they queue."""
    train = subject.train
    if train.concurrency <= _CROWD * train.engine_config.max_num_seqs:
        return None
    detail = (
        f"concurrency {train.concurrency} is more than {_CROWD} times engine_config.max_num_seqs "
        f"{train.engine_config.max_num_seqs}: most episodes hold an environment and wait for the engine"
    )
    return Hint(detail, f"lower {subject.prefix}concurrency, or raise {subject.prefix}engine_config.max_num_seqs")


@rule
def checkpoints_that_are_never_due(subject: Subject, machine: Machine) -> Hint | None:
    """A killed run would begin anew."""
    train = subject.train
    if train.save_every <= train.steps or not subject.chose("save_every"):
        return None
    detail = f"save_every {train.save_every} exceeds the {train.steps} steps: a run that is killed begins anew"
    return Hint(detail, f"set {subject.prefix}save_every below {train.steps}")


@rule
def canaries_that_are_never_due(subject: Subject, machine: Machine) -> Hint | None:
    """Only the first weights would be compared."""
    train = subject.train
    if train.canary_every <= train.steps or not subject.chose("canary_every"):
        return None
    detail = f"canary_every {train.canary_every} exceeds the {train.steps} steps: only the first weights are compared"
    return Hint(detail, f"set {subject.prefix}canary_every below {train.steps}")


@rule
def lag_longer_than_training(subject: Subject, machine: Machine) -> Hint | None:
    """Nothing would ever be too old."""
    train = subject.train
    if train.max_lag < train.steps or train.max_lag <= 1:
        return None
    detail = f"max_lag {train.max_lag} is as long as training ({train.steps} steps): no group is ever too old"
    return Hint(detail, f"set {subject.prefix}max_lag to 1 or 2")


@rule
def failures_that_never_stop_a_run(subject: Subject, machine: Machine) -> Hint | None:
    """A broken environment would be played for ever."""
    if subject.train.max_failure_rate < 1:
        return None
    detail = "max_failure_rate 1 switches the stop off: a run whose every episode fails waits for its step timeout"
    return Hint(detail, f"set {subject.prefix}max_failure_rate to 0.5 or less")


@rule
def batches_that_end_before_an_episode(subject: Subject, machine: Machine) -> Hint | None:
    """One slow episode would stop the run."""
    if not subject.chose("step_timeout_s"):
        return None
    longest_s, env_id = max((subject.suite.make(name).limits.episode_s, name) for name in subject.suite.env_ids)
    if subject.train.step_timeout_s > longest_s:
        return None
    detail = f"step_timeout_s {subject.train.step_timeout_s:g} is below the {longest_s:g} s of an episode of {env_id}"
    return Hint(detail, f"set {subject.prefix}step_timeout_s well above {longest_s:g}, or lower the episode's limit")


@rule
def environments_that_are_hardly_drawn(subject: Subject, machine: Machine) -> Hint | None:
    """Less than one group in the whole run."""
    total = math.fsum(subject.suite.weights.values())
    groups = subject.train.steps * subject.train.groups_per_step
    rare = [env_id for env_id, weight in subject.suite.weights.items() if weight / total * groups < 1]
    if not rare:
        return None
    return Hint(f"{', '.join(rare)} is drawn less than once in {groups} groups", "raise its weight, or leave it out")


@rule
def options_that_say_nothing(subject: Subject, machine: Machine) -> Hint | None:
    """An empty table looks as if it changed something."""
    empty = [env_id for env_id, options in subject.suite.options.items() if not options]
    return Hint(f"the options of {', '.join(empty)} are empty", "leave the table out") if empty else None


@rule
def seeds_that_the_job_replaces(subject: Subject, machine: Machine) -> Hint | None:
    """The main job has one seed."""
    replaced = {"sft.seed", "rl.seed", "rl.learner.seed"}
    idle = sorted(replaced & subject.given)
    return Hint(f"{', '.join(idle)} does nothing: the job's seed wins", "set seed instead") if idle else None


@rule
def sampling_that_is_nearly_greedy(subject: Subject, machine: Machine) -> Hint | None:
    """Nearly no group would have variance."""
    temperature = subject.train.sampling.temperature
    if temperature >= _NEARLY_GREEDY:
        return None
    detail = f"sampling.temperature {temperature:g} is nearly greedy: the episodes of a group hardly differ"
    return Hint(detail, f"set {subject.prefix}sampling.temperature and learner.temperature near 1")
