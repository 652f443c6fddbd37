"""How much memory a run will take, and how much of the disk, against what is there.

Certain is what the configuration and the model's files decide: weights, gradients and moments of AdamW, the copy that a
step of several updates keeps, the engine's weights, the attention cache that is set, published weights, checkpoints.
The rest is an estimate, which only warns: one micro-batch with its logits, an attention cache that grows with
conversations, libraries, and the environments as measured. Not counted: fragmentation, and what CUDA takes itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.doctor._check import Finding, failure, ok, warning
from palaestra.trainer.doctor._machine import Machine
from palaestra.trainer.doctor._model_size import ModelSize
from palaestra.types import Trajectory

_FLOAT, _HALF = 4, 2
_ADAMW = 4 * _FLOAT
"""Bytes of a parameter: itself, its gradient and two moments, all float32."""
_COPY = 3 * _FLOAT
"""Bytes of a parameter in the copy to which a refused step of several updates goes back."""
_CHECKPOINT = 3 * _FLOAT
"""Bytes of a parameter on the disk: itself and two moments. One checkpoint more than are kept is there for a moment."""
_NUM_PUBLISHED = 3
"""Sets of weights that are published at once: two slots, and the one that is being written."""
_PROCESS_MB = {"learner": 350, "vllm": 800, "transformers": 450, "trainer": 350}
"""Measured on a CPU with a model of three megabytes, libraries included, and rounded up."""
_TIGHT = 0.85
_SAVED = {False: (24, 16, 16), True: (26, 10, 8)}
"""Bytes that a token leaves in a layer for the backward pass, for each number of its hidden state, of its queries, keys
and values, and of its feed-forward part; in float32, and in bfloat16. Measured with Qwen3's layers."""
_LOGIT = 10
"""Bytes of a logit: itself in 16 bits, in float32, and its log-probability or gradient."""
_NUM_CANARIES = 2
_LEVELS = ("", "is tight", "may not fit", "cannot fit")
HOST, GPU = "host", "GPU"


@dataclass(frozen=True, slots=True)
class Need:
    """MiB of one part, in each place that it takes them from."""

    what: str
    mb: int
    places: tuple[str, ...]
    is_certain: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Conversations as the learner gets them: tokens of the longest, and the share of tokens that were sampled."""

    longest: int
    sampled_share: float = 1.0

    @classmethod
    def of(cls, trajectories: Collection[Trajectory], longest_said: int, context: int) -> Rows:
        """Measured where something was sampled; at worst a full context, every token of it sampled."""
        num_tokens = sum(map(len, trajectories))
        longest = max(longest_said, *map(len, trajectories), 0) if trajectories or longest_said else context
        share = sum(t.num_sampled for t in trajectories) / num_tokens if num_tokens else 1.0
        return cls(min(longest, context), share)


def plan(
    size: ModelSize, config: GRPOConfig, machine: Machine, rows: Rows, environments_mb: int | None = None
) -> list[Need]:
    """What each part needs."""
    learner = (GPU,) if machine.uses_gpu(config.learner.device) else (HOST,)
    published = _mb(min(_NUM_PUBLISHED, config.steps + 1) * _FLOAT * size.num_parameters)
    where = (HOST, machine.publish_place) if machine.publishes_to_memory else (machine.publish_place,)
    num_kept = min(config.num_checkpoints, config.steps // config.save_every) + 1
    libraries = sum(_PROCESS_MB[name] for name in ("learner", config.engine, "trainer"))
    needs = [
        Need("learner's weights, gradients and moments", _mb(_learner_bytes(size, config)), learner, True),
        Need("published weights", published, where, True),
        Need("checkpoints", _mb(num_kept * _CHECKPOINT * size.num_parameters), (machine.disk_place,), True),
        *_engine(size, config, machine),
        Need("micro-batch", _mb(micro_batch_bytes(size, config, rows, on_gpu=GPU in learner)), learner),
        Need("processes", libraries, (HOST,)),
    ]
    if environments_mb is not None:
        needs.append(Need("environments", environments_mb, (HOST,)))
    return needs


def judge_memory(needs: list[Need], machine: Machine) -> Finding:
    """A failure where what is certain does not fit, a warning where that and the estimates do not, or hardly."""
    free = {
        HOST: (machine.free_mb, machine.free_what),
        machine.publish_place: (machine.publish_free_mb, "free"),
        machine.disk_place: (machine.disk_free_mb, "free"),
    }
    if any(GPU in need.places for need in needs):
        free[GPU] = (machine.gpu_free_mb, "free")
    details: list[str] = []
    levels: dict[str, int] = {}
    for where, (free_mb, what) in free.items():
        parts = [need for need in needs if where in need.places]
        total, certain = sum(need.mb for need in parts), sum(need.mb for need in parts if need.is_certain)
        levels[where] = (total > _TIGHT * free_mb) + (total > free_mb) + (certain > free_mb)
        shares = ", ".join(_share(need) for need in sorted(parts, key=lambda n: -n.mb) if need.mb)
        details.append(f"{where}: about {total:,} MB of {free_mb:,} MB {what} ({shares})")
    worst = max(levels.values())
    if not worst:
        return ok("; ".join(details))
    detail = f"{_LEVELS[worst]}. {'; '.join(details)}"
    remedy = "; ".join(_remedy(where, machine) for where, level in levels.items() if level)
    return failure(detail, remedy) if _LEVELS[worst] == "cannot fit" else warning(detail, remedy)


def _share(need: Need) -> str:
    return f"{need.what} {'' if need.is_certain else 'perhaps '}{need.mb:,}"


def _remedy(where: str, machine: Machine) -> str:
    if where == machine.publish_place:
        return f"give {where} more room (a container: --shm-size), or take a smaller model"
    if where == machine.disk_place:
        return "lower num_checkpoints, or choose a run folder on a larger disk"
    return (
        f"{where}: lower engine_config.kv_cache_mb or gpu_memory_utilization, learner.max_micro_batch_tokens, "
        "max_model_len or concurrency, or take a smaller model"
    )


def _learner_bytes(size: ModelSize, config: GRPOConfig) -> int:
    has_copy = config.learner.num_minibatches * config.learner.num_epochs > 1
    return size.num_parameters * (_ADAMW + (_COPY if has_copy else 0))


def micro_batch_bytes(size: ModelSize, config: GRPOConfig, rows: Rows, *, on_gpu: bool) -> int:
    """The larger of a training pass, with logits at sampled positions, and a canary's, with logits at all of them."""
    precision = config.learner.precision
    is_half = precision == "bfloat16" or (precision == "auto" and on_gpu)
    limit = max(config.learner.max_micro_batch_tokens, rows.longest)
    tokens = min(limit, rows.longest * config.group_size * config.groups_per_step)
    hidden, attention, ffn = _SAVED[is_half]
    wide = (size.num_heads + 2 * size.num_kv_heads) * size.head_dim
    saved = size.num_layers * (hidden * size.hidden_size + attention * wide + ffn * size.ffn_size)
    casts = _HALF * size.num_parameters if is_half else 0
    training = tokens * (saved + rows.sampled_share * _LOGIT * size.vocab_size)
    scoring = min(limit, _NUM_CANARIES * rows.longest) * _LOGIT * size.vocab_size
    return casts + int(max(training, scoring))


def _engine(size: ModelSize, config: GRPOConfig, machine: Machine) -> list[Need]:
    engine = config.engine_config
    on_gpu = machine.uses_gpu(engine.device)
    place = (GPU,) if on_gpu else (HOST,)
    if config.engine == "vllm" and on_gpu:
        share_mb = int(engine.gpu_memory_utilization * machine.gpu_total_mb)
        return [Need("engine (its share of the GPU)", share_mb, place, True)]
    is_wide = engine.dtype == "float32" or (engine.dtype == "auto" and not on_gpu)
    width = _FLOAT if is_wide else _HALF
    weights = Need("engine's weights", _mb(width * size.num_parameters), place, True)
    if config.engine == "vllm":
        return [weights, Need("attention cache", engine.kv_cache_mb, place, True)]
    token = 2 * size.num_layers * size.num_kv_heads * size.head_dim * width
    rows = min(engine.max_num_seqs, config.concurrency)
    return [weights, Need("attention cache", _mb(token * rows * engine.max_model_len), place)]


def _mb(count: int) -> int:
    return -(-count >> 20)
