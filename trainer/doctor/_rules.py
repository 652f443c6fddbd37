"""Settings that do nothing, contradict each other, or endanger a run: rules over a whole job, each a pure function.

What cannot work at all is refused when a configuration is read, and what is measured has a row of its own. A rule is
for what is accepted and yet does nothing, or defeats itself. Invariant: a job of defaults meets no rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from palaestra.agents.renderers import has_own_format
from palaestra.trainer.doctor._check import Finding, together, warning
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._subject import NewModel, Subject
from palaestra.trainer.losses import LossConfig, find_loss
from palaestra.trainer.rollouts import most_in_hand

_BFLOAT16_NATS = 0.02
_WEIGHT = 0.01
"""Typical size of a weight of a language model."""
_CLIPS = ("clip_low", "clip_high", "dual_clip")
_ON_POLICY = ("ppo_clip", "gspo")


class Hint(NamedTuple):
    """What is wrong with a setting, and what to do."""

    detail: str
    remedy: str


Rule = Callable[[Subject, Machine], Hint | None]

RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Decorator that adds a rule."""
    RULES.append(function)
    return function


def find_hints(subject: Subject, machine: Machine) -> dict[str, Hint]:
    """What the rules say, by the rule's name."""
    found = {each.__name__: each(subject, machine) for each in RULES}
    return {name: hint for name, hint in found.items() if hint is not None}


def check_settings(subject: Subject, machine: Machine) -> Finding:
    """Every rule, applied; each that is met is a warning."""
    findings = [warning(hint.detail, hint.remedy) for hint in find_hints(subject, machine).values()]
    return together(findings, f"none of {len(RULES)} rules about inert or self-defeating settings applies")


# What nothing reads.


def _drop(subject: Subject, key: str) -> str:
    return f"leave {subject.prefix}{key} out"


@rule
def constant_length_without_its_denominator(subject: Subject, machine: Machine) -> Hint | None:
    """Only the denominator `constant` reads it."""
    denominator = subject.train.learner.denominator
    if denominator == "constant" or not subject.chose("learner.constant_length"):
        return None
    key = f"{subject.prefix}learner"
    remedy = f"set {key}.denominator = 'constant', or {_drop(subject, 'learner.constant_length')}"
    return Hint(f"{key}.constant_length does nothing: the denominator is {denominator!r}", remedy)


@rule
def loss_parameters_that_the_loss_does_not_read(subject: Subject, machine: Machine) -> Hint | None:
    """A changed one is refused when it is read; one that repeats the default is only idle."""
    name = subject.train.learner.loss.name
    fields = set(LossConfig.model_fields) - {"name"} - find_loss(name).uses
    idle = sorted(field for field in fields if subject.chose(f"learner.loss.{field}"))
    if not idle:
        return None
    uses = ", ".join(sorted(find_loss(name).uses)) or "none"
    detail = f"loss {name!r} does not read {', '.join(idle)}; it reads {uses}"
    return Hint(detail, _drop(subject, f"learner.loss.{idle[0]}"))


@rule
def clipping_of_a_ratio_that_is_one(subject: Subject, machine: Machine) -> Hint | None:
    """Without lag, and with one update a batch, the policy is the one that sampled."""
    train = subject.train
    chosen = [name for name in _CLIPS if subject.chose(f"learner.loss.{name}")]
    if train.max_lag or _updates_per_step(subject) > 1 or train.learner.loss.name not in _ON_POLICY or not chosen:
        return None
    detail = f"learner.loss.{chosen[0]} never acts: in mode 'sync' with one update a batch every ratio is 1"
    remedy = _drop(subject, f"learner.loss.{chosen[0]}")
    return Hint(detail, f"raise {subject.prefix}learner.num_minibatches, allow a lag, or {remedy}")


@rule
def learner_seed_that_deals_nothing(subject: Subject, machine: Machine) -> Hint | None:
    """It deals the rows of a batch into minibatches, and one takes them all."""
    if subject.train.learner.num_minibatches > 1 or not subject.chose("learner.seed"):
        return None
    detail = "learner.seed does nothing: it deals a batch into minibatches, and learner.num_minibatches is 1"
    return Hint(detail, f"{_drop(subject, 'learner.seed')}, or raise {subject.prefix}learner.num_minibatches")


@rule
def cpu_cache_where_none_is(subject: Subject, machine: Machine) -> Hint | None:
    """Only vLLM on a CPU reads it."""
    train = subject.train
    on_gpu = machine.uses_gpu(train.engine_config.device)
    if not subject.chose("engine_config.kv_cache_mb") or (train.engine == "vllm" and not on_gpu):
        return None
    why = "the engine is on a GPU" if train.engine == "vllm" else f"the engine is {train.engine!r}"
    remedy = _drop(subject, "engine_config.kv_cache_mb")
    return Hint(f"engine_config.kv_cache_mb does nothing: {why}", remedy)


@rule
def gpu_share_where_none_is(subject: Subject, machine: Machine) -> Hint | None:
    """Only vLLM on a GPU reads it."""
    train = subject.train
    on_gpu = machine.uses_gpu(train.engine_config.device)
    if not subject.chose("engine_config.gpu_memory_utilization") or (train.engine == "vllm" and on_gpu):
        return None
    why = "the engine is on a CPU" if train.engine == "vllm" else f"the engine is {train.engine!r}"
    remedy = _drop(subject, "engine_config.gpu_memory_utilization")
    return Hint(f"engine_config.gpu_memory_utilization does nothing: {why}", remedy)


@rule
def seed_of_requests_that_bring_their_own(subject: Subject, machine: Machine) -> Hint | None:
    """Every request of a rollout has a seed made from the run's."""
    if not subject.chose("engine_config.seed"):
        return None
    remedy = f"set {subject.prefix}seed instead" if subject.prefix == "train." else "set seed instead"
    return Hint("engine_config.seed does nothing in training: every request brings a seed made from the run's", remedy)


@rule
def seeds_that_the_job_replaces(subject: Subject, machine: Machine) -> Hint | None:
    """The main job has one seed."""
    idle = sorted({"sft.seed", "rl.seed", "rl.learner.seed"} & subject.given)
    return Hint(f"{', '.join(idle)} does nothing: the job's seed wins", "set seed instead") if idle else None


@rule
def family_of_a_model_that_has_its_own_format(subject: Subject, machine: Machine) -> Hint | None:
    """Models made by palaestra say how they are talked to, and win."""
    is_chosen = subject.chose("family") or "family" in subject.given
    if not is_chosen or (isinstance(subject.model, str) and not has_own_format(subject.model)):
        return None
    return Hint("family does nothing: a model made by palaestra has a chat format of its own", "leave family out")


@rule
def size_of_a_model_that_is_given(subject: Subject, machine: Machine) -> Hint | None:
    """The main job makes a small model only where none is given."""
    idle = sorted(key for key in subject.given if key == "vocab_size" or key.startswith("tiny."))
    if isinstance(subject.model, NewModel) or not idle:
        return None
    return Hint(f"{', '.join(idle)} does nothing: the model is given", "leave it out, or leave model out")


# What is never reached.


@rule
def context_longer_than_the_models(subject: Subject, machine: Machine) -> Hint | None:
    """The engine cuts it."""
    asked, fitted = subject.train.engine_config.max_model_len, subject.context
    if fitted == asked or not subject.chose("engine_config.max_model_len"):
        return None
    detail = f"engine_config.max_model_len {asked} is cut to the {fitted} positions that the model was made for"
    return Hint(detail, f"set {subject.prefix}engine_config.max_model_len to {fitted}, or take a model that reads more")


@rule
def more_episodes_at_once_than_are_in_hand(subject: Subject, machine: Machine) -> Hint | None:
    """Groups are issued only as the lag allows."""
    train = subject.train
    most = most_in_hand(
        group_size=train.group_size,
        groups_per_step=train.groups_per_step,
        max_lag=train.max_lag,
        num_spare=train.num_spare,
    )
    if train.concurrency <= most or not subject.chose("concurrency"):
        return None
    detail = (
        f"concurrency {train.concurrency} is never reached: with max_lag {train.max_lag} at most {most} episodes are "
        f"in hand ({train.groups_per_step} groups of {train.group_size + train.num_spare}, {train.max_lag + 1} times)"
    )
    return Hint(detail, f"set {subject.prefix}concurrency to {most}, or raise groups_per_step")


@rule
def more_requests_than_episodes(subject: Subject, machine: Machine) -> Hint | None:
    """An episode asks for one reply at a time."""
    asked, concurrency = subject.train.engine_config.max_num_seqs, subject.train.concurrency
    if asked <= concurrency or not subject.chose("engine_config.max_num_seqs"):
        return None
    detail = f"engine_config.max_num_seqs {asked} is never reached: {concurrency} episodes ask for a reply each"
    return Hint(detail, f"set {subject.prefix}engine_config.max_num_seqs to {concurrency}, or raise concurrency")


@rule
def replies_longer_than_the_context(subject: Subject, machine: Machine) -> Hint | None:
    """The context ends them first."""
    asked, context = subject.train.sampling.max_tokens, subject.context
    if asked < context or not subject.chose("sampling.max_tokens"):
        return None
    detail = f"sampling.max_tokens {asked} is never reached: a conversation has room for {context} tokens in all"
    return Hint(detail, f"set {subject.prefix}sampling.max_tokens well below {context}")


@rule
def lag_beyond_training(subject: Subject, machine: Machine) -> Hint | None:
    """No policy of the run is as old."""
    train = subject.train
    if train.max_lag < train.steps or not subject.chose("max_lag"):
        return None
    detail = f"max_lag {train.max_lag} bounds nothing: in {train.steps} steps no group is older"
    return Hint(detail, f"set {subject.prefix}max_lag to 1 or 2, or raise steps")


@rule
def steps_larger_than_weights(subject: Subject, machine: Machine) -> Hint | None:
    """AdamW moves each weight by about the learning rate in an update."""
    rate = subject.train.learner.learning_rate
    if rate < _WEIGHT or not subject.chose("learner.learning_rate"):
        return None
    detail = f"learner.learning_rate {rate:g} overwrites the model: an update moves each weight by about as much"
    return Hint(detail, f"set {subject.prefix}learner.learning_rate to 1e-6, for small models to 1e-3 at most")


@rule
def warmup_longer_than_training(subject: Subject, machine: Machine) -> Hint | None:
    """The learning rate never arrives."""
    updates = subject.train.steps * _updates_per_step(subject)
    warmup = subject.train.learner.warmup_updates
    if warmup <= updates:
        return None
    reached = subject.train.learner.learning_rate * updates / warmup
    detail = f"learner.warmup_updates {warmup} covers all {updates} updates: the learning rate ends at {reached:.2g}"
    few = updates // 10
    key = "learner.warmup_updates"
    return Hint(detail, f"set {subject.prefix}{key} to at most {few}" if few else _drop(subject, key))


@rule
def more_minibatches_than_rows(subject: Subject, machine: Machine) -> Hint | None:
    """Some updates would have nothing to learn from."""
    train = subject.train
    rows = train.group_size * train.groups_per_step
    if train.learner.num_minibatches <= rows:
        return None
    detail = f"learner.num_minibatches {train.learner.num_minibatches} exceeds the {rows} episodes of a batch"
    return Hint(detail, f"set {subject.prefix}learner.num_minibatches to at most {rows}")


@rule
def checkpoints_that_are_never_due(subject: Subject, machine: Machine) -> Hint | None:
    """A killed run would begin anew."""
    train = subject.train
    if train.save_every <= train.steps or not subject.chose("save_every"):
        return None
    detail = f"save_every {train.save_every} exceeds the {train.steps} steps: a run that is killed begins anew"
    return Hint(detail, f"set {subject.prefix}save_every to at most {train.steps}")


@rule
def canaries_that_are_never_due(subject: Subject, machine: Machine) -> Hint | None:
    """Only the first weights would be compared."""
    train = subject.train
    if train.canary_every <= train.steps or not subject.chose("canary_every"):
        return None
    detail = f"canary_every {train.canary_every} exceeds the {train.steps} steps: only the first weights are compared"
    return Hint(detail, f"set {subject.prefix}canary_every to at most {train.steps}")


# What takes a guard away, or stops a healthy run.


@rule
def failures_that_never_stop_a_run(subject: Subject, machine: Machine) -> Hint | None:
    """A broken environment would be played for ever."""
    if subject.train.max_failure_rate < 1:
        return None
    detail = "max_failure_rate 1 switches the stop off: a run whose every episode fails waits for its step timeout"
    return Hint(detail, f"set {subject.prefix}max_failure_rate to 0.5 or less")


@rule
def episodes_without_advantage_that_never_stop_a_run(subject: Subject, machine: Machine) -> Hint | None:
    """As above, for timeouts too."""
    if subject.train.max_invalid_rate < 1:
        return None
    detail = (
        "max_invalid_rate 1 switches the stop off: a run of which no episode gets an advantage waits for its step "
        "timeout"
    )
    return Hint(detail, f"set {subject.prefix}max_invalid_rate to 0.9 or less")


@rule
def stalls_that_are_never_told(subject: Subject, machine: Machine) -> Hint | None:
    """The run stops before it would have written who waits for whom."""
    train = subject.train
    if train.stall_report_s < train.step_timeout_s:
        return None
    detail = (
        f"stall_report_s {train.stall_report_s:g} is not below step_timeout_s {train.step_timeout_s:g}: a run that "
        "hangs stops without a report"
    )
    return Hint(detail, f"set {subject.prefix}stall_report_s well below {train.step_timeout_s:g}")


@rule
def batches_that_end_before_an_episode(subject: Subject, machine: Machine) -> Hint | None:
    """One slow episode would stop the run."""
    if not subject.chose("step_timeout_s"):
        return None
    longest_s, env_id = _longest_episode(subject)
    if subject.train.step_timeout_s > longest_s:
        return None
    detail = f"step_timeout_s {subject.train.step_timeout_s:g} is below the {longest_s:g} s of an episode of {env_id}"
    return Hint(detail, f"set {subject.prefix}step_timeout_s well above {longest_s:g}, or lower the episode's limit")


@rule
def groups_that_end_before_an_episode(subject: Subject, machine: Machine) -> Hint | None:
    """Long episodes would be cut, and only short ones trained on."""
    train = subject.train
    if not subject.chose("group_timeout_s") and not subject.chose("step_timeout_s"):
        return None
    longest_s, env_id = _longest_episode(subject)
    if train.group_timeout_s >= longest_s or train.step_timeout_s <= longest_s:
        return None
    detail = f"group_timeout_s {train.group_timeout_s:g} is below the {longest_s:g} s of an episode of {env_id}"
    return Hint(detail, f"set {subject.prefix}group_timeout_s above {longest_s:g}, or lower the episode's limit")


@rule
def tolerance_below_rounding(subject: Subject, machine: Machine) -> Hint | None:
    """bfloat16 alone differs by more: the canary would stop a healthy run."""
    train = subject.train
    by_gpu = train.engine_config.dtype == "auto" and machine.uses_gpu(train.engine_config.device)
    is_coarse = by_gpu or train.engine_config.dtype in ("bfloat16", "float16") or train.learner.precision == "bfloat16"
    if not is_coarse or train.canary_tolerance >= _BFLOAT16_NATS:
        return None
    detail = f"canary_tolerance {train.canary_tolerance:g} is below what 16-bit arithmetic differs by"
    return Hint(
        detail, f"set {subject.prefix}canary_tolerance to {_BFLOAT16_NATS} or more, or use float32 on both sides"
    )


def _longest_episode(subject: Subject) -> tuple[float, str]:
    """The longest time that an episode may take, and in which environment."""
    return max((subject.suite.make(name).limits.episode_s, name) for name in subject.suite.env_ids)


def _updates_per_step(subject: Subject) -> int:
    return subject.train.learner.num_minibatches * subject.train.learner.num_epochs
