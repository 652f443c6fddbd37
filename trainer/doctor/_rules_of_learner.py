"""Rules about the loss, the optimiser and the learner's batches."""

from __future__ import annotations

from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._rules import Hint, drop, rule
from palaestra.trainer.doctor._subject import Subject
from palaestra.trainer.losses import LossConfig, find_loss

_FEW_EPISODES = 4
_BFLOAT16_NATS = 0.02
_CLIPS = ("clip_low", "clip_high", "dual_clip")
_ON_POLICY = ("ppo_clip", "gspo")


def updates_per_step(subject: Subject) -> int:
    """Optimiser updates that one batch gives."""
    return subject.train.learner.num_minibatches * subject.train.learner.num_epochs


@rule
def constant_length_without_its_denominator(subject: Subject, machine: Machine) -> Hint | None:
    """Only the denominator `constant` reads it."""
    denominator = subject.train.learner.denominator
    if denominator == "constant" or not subject.chose("learner.constant_length"):
        return None
    key = f"{subject.prefix}learner"
    remedy = f"set {key}.denominator = 'constant', or {drop(subject, 'learner.constant_length')}"
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
    return Hint(detail, drop(subject, f"learner.loss.{idle[0]}"))


@rule
def clipping_of_a_ratio_that_is_one(subject: Subject, machine: Machine) -> Hint | None:
    """Without lag, and with one update a batch, the policy is the one that sampled."""
    train = subject.train
    chosen = [name for name in _CLIPS if subject.chose(f"learner.loss.{name}")]
    if train.max_lag or updates_per_step(subject) > 1 or train.learner.loss.name not in _ON_POLICY or not chosen:
        return None
    detail = f"learner.loss.{chosen[0]} never acts: in mode 'sync' with one update a batch every ratio is 1"
    return Hint(detail, f"raise {subject.prefix}learner.num_minibatches, allow a lag, or {drop(subject, chosen[0])}")


@rule
def warmup_longer_than_training(subject: Subject, machine: Machine) -> Hint | None:
    """The learning rate never arrives."""
    updates = subject.train.steps * updates_per_step(subject)
    warmup = subject.train.learner.warmup_updates
    if warmup < updates:
        return None
    reached = subject.train.learner.learning_rate * updates / warmup
    detail = f"learner.warmup_updates {warmup} covers all {updates} updates: the learning rate ends at {reached:.2g}"
    return Hint(detail, f"set {subject.prefix}learner.warmup_updates to at most {updates // 10}")


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
def micro_batch_shorter_than_a_conversation(subject: Subject, machine: Machine) -> Hint | None:
    """A longer row is a micro-batch of its own, so the bound does not hold."""
    limit, length = subject.train.learner.max_micro_batch_tokens, subject.train.engine_config.max_model_len
    if limit >= length or not subject.chose("learner.max_micro_batch_tokens"):
        return None
    detail = f"learner.max_micro_batch_tokens {limit} does not bound memory: one conversation may have {length} tokens"
    return Hint(detail, f"plan with {length}, or lower {subject.prefix}engine_config.max_model_len")


@rule
def small_groups_that_drop_equal_ones(subject: Subject, machine: Machine) -> Hint | None:
    """Few episodes of one task often agree by chance."""
    train = subject.train
    if not train.drop_zero_variance or train.group_size >= _FEW_EPISODES:
        return None
    share = 2 * 0.5**train.group_size
    detail = (
        f"drop_zero_variance with group_size {train.group_size}: even of tasks that are solved half the time "
        f"{share:.0%} of the groups are thrown away"
    )
    return Hint(detail, f"set {subject.prefix}group_size to {_FEW_EPISODES} or more, or keep equal groups")


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


@rule
def precisions_that_differ(subject: Subject, machine: Machine) -> Hint | None:
    """Engine and learner would compute two policies."""
    engine, learner = subject.train.engine_config.dtype, subject.train.learner.precision
    if "auto" in (engine, learner) or engine == learner:
        return None
    detail = f"the engine computes in {engine}, the learner in {learner}: every ratio starts away from 1"
    return Hint(detail, f"set {subject.prefix}engine_config.dtype and {subject.prefix}learner.precision to the same")


@rule
def learner_threads_beyond_the_cores(subject: Subject, machine: Machine) -> Hint | None:
    """They take turns."""
    threads = subject.train.learner.threads
    if threads <= machine.num_cores:
        return None
    detail = f"learner.threads {threads} on {machine.num_cores} cores: they wait for each other"
    return Hint(detail, f"set {subject.prefix}learner.threads to at most {machine.num_cores}")
