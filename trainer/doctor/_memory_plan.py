"""How much memory a run will take, against what is there.

Covers: weights, gradients, both moments of AdamW, one micro-batch with its logits, the copy that a step of several
updates keeps, the two published sets of weights in shared memory, the engine's weights and attention cache, the
environments as measured. An estimate: libraries and fragmentation are allowed for by a flat amount for each process.
"""

from __future__ import annotations

from dataclasses import dataclass

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor._check import Finding, failure, ok, warning
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._model_size import ModelSize

_FLOAT, _HALF = 4, 2
_ADAMW = 4 * _FLOAT
"""Bytes of a parameter: itself, its gradient and two moments, all float32."""
_COPY = 3 * _FLOAT
"""Bytes of a parameter in the copy to which a refused step of several updates goes back."""
_PROCESS_MB = {"learner": 350, "vllm": 800, "transformers": 450, "trainer": 350}
"""Measured on a CPU with a model of three megabytes, libraries included, and rounded up."""
_TIGHT = 0.85
_LOGIT_COPIES = 3
"""Logits, their float32 form, and the gradient."""


@dataclass(frozen=True, slots=True)
class Need:
    """MiB of one part, on the host or on the GPU."""

    what: str
    mb: int
    is_gpu: bool


def plan(size: ModelSize, config: GRPOConfig, machine: Machine, environments_mb: int | None) -> list[Need]:
    """What each part needs."""
    on_gpu = machine.uses_gpu(config.learner.device)
    needs = [
        Need("learner's weights, gradients and moments", _mb(size.num_parameters * _learner_bytes(config)), on_gpu),
        Need("micro-batch", _mb(_micro_batch_bytes(size, config)), on_gpu),
        Need("published weights", _mb(2 * _FLOAT * size.num_parameters), False),
        *_engine(size, config, machine),
        Need("processes", sum(_PROCESS_MB[name] for name in ("learner", config.engine, "trainer")), False),
    ]
    if environments_mb is not None:
        needs.append(Need("environments", environments_mb, False))
    return needs


def judge_memory(needs: list[Need], machine: Machine) -> Finding:
    """Whether the sum fits on the host, and on the GPU."""
    host = [need for need in needs if not need.is_gpu]
    gpu = [need for need in needs if need.is_gpu]
    places = [("host", host, machine.free_mb, machine.free_what)]
    if gpu:
        places.append(("GPU", gpu, machine.gpu_free_mb, "free"))
    details, is_over, is_tight = [], False, False
    for where, parts, free_mb, what in places:
        total = sum(need.mb for need in parts)
        shares = ", ".join(f"{need.what} {need.mb:,}" for need in sorted(parts, key=lambda n: -n.mb) if need.mb)
        details.append(f"{where}: about {total:,} MB of {free_mb:,} MB {what} ({shares})")
        is_over |= total > free_mb
        is_tight |= total > _TIGHT * free_mb
    detail = "; ".join(details)
    remedy = (
        "lower learner.max_micro_batch_tokens, engine_config.kv_cache_mb or gpu_memory_utilization, max_model_len or "
        "concurrency, or take a smaller model"
    )
    if is_over:
        return failure(f"does not fit. {detail}", remedy)
    return warning(f"is tight. {detail}", remedy) if is_tight else ok(detail)


def _learner_bytes(config: GRPOConfig) -> int:
    has_copy = config.learner.num_minibatches * config.learner.num_epochs > 1
    return _ADAMW + (_COPY if has_copy else 0)


def _micro_batch_bytes(size: ModelSize, config: GRPOConfig) -> int:
    """Activations without recomputation, and logits at every position, the most that may be asked for."""
    tokens = max(config.learner.max_micro_batch_tokens, config.engine_config.max_model_len)
    a_layer = 8 * size.hidden_size + 3 * size.ffn_size + 2 * size.num_kv_heads * size.head_dim
    return tokens * _FLOAT * (size.num_layers * a_layer + _LOGIT_COPIES * size.vocab_size)


def _engine(size: ModelSize, config: GRPOConfig, machine: Machine) -> list[Need]:
    engine = config.engine_config
    on_gpu = machine.uses_gpu(engine.device)
    is_wide = engine.dtype == "float32" or (engine.dtype == "auto" and not on_gpu)
    width = _FLOAT if is_wide else _HALF
    weights = Need("engine's weights", _mb(width * size.num_parameters), on_gpu)
    if config.engine == "vllm" and on_gpu:
        return [Need("engine (its share of the GPU)", int(engine.gpu_memory_utilization * machine.gpu_total_mb), True)]
    if config.engine == "vllm":
        return [weights, Need("attention cache", engine.kv_cache_mb, False)]
    token = 2 * size.num_layers * size.num_kv_heads * size.head_dim * width
    rows = min(engine.max_num_seqs, config.concurrency)
    return [weights, Need("attention cache", _mb(token * rows * engine.max_model_len), on_gpu)]


def _mb(count: int) -> int:
    return -(-count >> 20)
