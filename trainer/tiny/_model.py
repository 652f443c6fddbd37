"""A small untrained transformer in the Llama layout, which Transformers and vLLM load like any published one.

Invariant: the same configuration and seed give the same bytes. Torch is imported when a model is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from palaestra.agents.renderers.compact import END, PAD
from palaestra.config import Config
from palaestra.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig

COPYING_HEADS = 4
"""Fewest heads with which the copying start can be placed."""
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of an attention head that vLLM 0.32 computes on a CPU."""


class TinyModelConfig(Config):
    """Size of a model made from scratch."""

    architecture: Literal["llama", "qwen3"] = "llama"
    """Llama, with attention biases, or Qwen3, which normalises queries and keys instead and takes longer."""
    start: Literal["copying", "random"] = "copying"
    """`copying` places parts of a copying circuit, and learns to copy several times sooner; see `_init.py`."""
    hidden_size: int = Field(default=128, ge=32)
    """Width of the residual stream."""
    num_layers: int = Field(default=3, ge=2)
    """Copying takes two layers at least."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads; as many key heads."""
    head_dim: int = 32
    """Width of a head; one that vLLM computes."""
    ffn_size: int = Field(default=256, ge=1)
    """Width of the feed-forward layers."""
    max_positions: int = Field(default=1024, ge=16)
    """Longest context in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position frequencies."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights."""

    @model_validator(mode="after")
    def _check(self) -> TinyModelConfig:
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim must be one of {HEAD_DIMS}, not {self.head_dim}")
        if self.start == "copying" and self.architecture != "llama":
            raise ValueError("start 'copying' needs architecture 'llama'; or say start 'random'")
        if self.start == "copying" and min(self.num_heads, self.hidden_size // self.head_dim) < COPYING_HEADS:
            raise ValueError(
                f"start 'copying' needs {COPYING_HEADS} heads and a hidden_size of {COPYING_HEADS} head_dim at least"
            )
        if self.start == "copying" and self.hidden_size % self.head_dim:
            raise ValueError(f"start 'copying' needs a hidden_size divisible by head_dim {self.head_dim}")
        return self


def make_model(folder: Path, config: TinyModelConfig | None = None, *, seed: int = 0) -> Path:
    """Write an untrained float32 model with tied embeddings beside the tokenizer in `folder`; returns the folder.

    Raises `ConfigError` when there is no tokenizer yet.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from palaestra.trainer.tiny._init import draw_random, place_copying

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"no tokenizer in {folder}; make one with make_tokenizer() first")
    size = config or TinyModelConfig()
    model = AutoModelForCausalLM.from_config(_layout(size, Tokenizer.from_file(str(path))), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    draw_random(model, size.init_std, generator)
    if size.start == "copying":
        place_copying(model, generator)
    disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def _layout(size: TinyModelConfig, tokenizer: Tokenizer) -> PreTrainedConfig:
    from transformers import LlamaConfig, Qwen3Config

    common = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "dtype": "float32",
    }
    if size.architecture == "qwen3":
        return Qwen3Config(**common)
    # not Qwen2, which has the same biases: Transformers replaces the tokenizer of that model type by its own
    return LlamaConfig(**common, attention_bias=True)
