"""What a local engine may use: context length, concurrency, memory, precision, device, deadlines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from palaestra.config import Config


class EngineConfig(Config):
    """One model on one device, in one process of its own."""

    max_model_len: int = Field(default=4096, ge=2)
    """Most tokens of prompt and completion together; cut to what the model was made for."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most requests that are computed together; the others queue."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and arithmetic; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    kv_cache_mb: int = Field(default=1024, ge=1)
    """Memory of the attention cache in MiB; vLLM on a CPU only."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, lt=1)
    """Share of a GPU's memory for weights and attention cache; vLLM on a GPU only."""
    seed: int = 0
    """Seed of requests that bring none."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the engine's process; small models gain nothing from a second one."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` takes a GPU when torch sees one."""
    batch_invariant: Literal["auto", "always", "never"] = "auto"
    """Whether each sequence is computed by itself, so that its neighbours change no bit of it; slower, and only with
    Transformers. `auto` does so in training with mode `sync`: a resumed run then equals an unbroken one to the bit."""
    call_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of one call, time in the queue included."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Deadline of start-up: imports, loading, and on a GPU graph capture."""
