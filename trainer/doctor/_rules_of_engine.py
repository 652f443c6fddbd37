"""Rules about the engine: context, memory, device, and how many requests it gets."""

from __future__ import annotations

from pathlib import Path

from palaestra.agents.engines import fit_context
from palaestra.agents.renderers import read_marker
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._rules import Hint, drop, rule
from palaestra.trainer.doctor._subject import NewModel, Subject


def fitted_context(subject: Subject) -> int:
    """Most tokens of a conversation: what is asked for, cut to what the model was made for."""
    config = subject.train.engine_config
    if isinstance(subject.model, NewModel):
        return min(config.max_model_len, subject.model.size.max_positions)
    return fit_context(config, str(Path(subject.model).expanduser())).max_model_len


@rule
def context_longer_than_the_models(subject: Subject, machine: Machine) -> Hint | None:
    """The engine cuts it."""
    asked, fitted = subject.train.engine_config.max_model_len, fitted_context(subject)
    if fitted == asked or not subject.chose("engine_config.max_model_len"):
        return None
    detail = f"engine_config.max_model_len {asked} is cut to the {fitted} positions that the model was made for"
    return Hint(detail, f"set {subject.prefix}engine_config.max_model_len to {fitted}, or take a model that reads more")


@rule
def replies_as_long_as_the_context(subject: Subject, machine: Machine) -> Hint | None:
    """One reply may use up the whole conversation."""
    limit, context = subject.train.sampling.max_tokens, fitted_context(subject)
    if limit < context:
        return None
    detail = f"sampling.max_tokens {limit} is as long as the context of {context}: one reply can end an episode"
    return Hint(detail, f"set {subject.prefix}sampling.max_tokens well below {context}")


@rule
def cpu_cache_where_none_is(subject: Subject, machine: Machine) -> Hint | None:
    """Only vLLM on a CPU reads it."""
    train = subject.train
    on_gpu = machine.uses_gpu(train.engine_config.device)
    if not subject.chose("engine_config.kv_cache_mb") or (train.engine == "vllm" and not on_gpu):
        return None
    why = "the engine is on a GPU" if train.engine == "vllm" else f"the engine is {train.engine!r}"
    remedy = drop(subject, "engine_config.kv_cache_mb")
    return Hint(f"engine_config.kv_cache_mb does nothing: {why}", remedy)


@rule
def gpu_share_where_none_is(subject: Subject, machine: Machine) -> Hint | None:
    """Only vLLM on a GPU reads it."""
    train = subject.train
    on_gpu = machine.uses_gpu(train.engine_config.device)
    if not subject.chose("engine_config.gpu_memory_utilization") or (train.engine == "vllm" and on_gpu):
        return None
    why = "the engine is on a CPU" if train.engine == "vllm" else f"the engine is {train.engine!r}"
    remedy = drop(subject, "engine_config.gpu_memory_utilization")
    return Hint(f"engine_config.gpu_memory_utilization does nothing: {why}", remedy)


@rule
def seed_of_requests_that_bring_their_own(subject: Subject, machine: Machine) -> Hint | None:
    """Every request of a rollout has a seed made from the run's."""
    if not subject.chose("engine_config.seed"):
        return None
    remedy = f"set {subject.prefix}seed instead" if subject.prefix == "train." else "set seed instead"
    return Hint("engine_config.seed does nothing in training: every request brings a seed made from the run's", remedy)


@rule
def more_sequences_than_episodes(subject: Subject, machine: Machine) -> Hint | None:
    """An episode has one request at a time."""
    limit, episodes = subject.train.engine_config.max_num_seqs, subject.train.concurrency
    if limit <= episodes or not subject.chose("engine_config.max_num_seqs"):
        return None
    detail = f"engine_config.max_num_seqs {limit} is never reached: {episodes} episodes are played at once"
    return Hint(
        detail, f"raise {subject.prefix}concurrency to {limit}, or {drop(subject, 'engine_config.max_num_seqs')}"
    )


@rule
def engine_threads_beyond_the_cores(subject: Subject, machine: Machine) -> Hint | None:
    """They take turns."""
    threads = subject.train.engine_config.threads
    if threads <= machine.num_cores:
        return None
    detail = f"engine_config.threads {threads} on {machine.num_cores} cores: they wait for each other"
    return Hint(detail, f"set {subject.prefix}engine_config.threads to at most {machine.num_cores}")


@rule
def family_of_a_model_that_has_its_own_format(subject: Subject, machine: Machine) -> Hint | None:
    """Models made by palaestra say how they are talked to, and win."""
    chosen = subject.chose("family") or "family" in subject.given
    if not chosen:
        return None
    if isinstance(subject.model, str) and read_marker(Path(subject.model).expanduser()).get("renderer") != "compact":
        return None
    return Hint("family does nothing: a model made by palaestra has a chat format of its own", "leave family out")


@rule
def size_of_a_model_that_is_given(subject: Subject, machine: Machine) -> Hint | None:
    """The main job makes a small model only where none is given."""
    idle = sorted(key for key in subject.given if key == "vocab_size" or key.startswith("tiny."))
    if isinstance(subject.model, NewModel) or not idle:
        return None
    return Hint(f"{', '.join(idle)} does nothing: the model is given", "leave it out, or leave model out")
