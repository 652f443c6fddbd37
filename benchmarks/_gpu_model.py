"""The model of the benchmarks on one GPU."""

from __future__ import annotations

from palaestra.trainer.tiny import TinyModelConfig


def size_of(hidden: int) -> TinyModelConfig:
    """Twelve layers of this width, of which 1024 makes 202 million weights; two layers up to a width of 64."""
    return TinyModelConfig(
        start="random",
        hidden_size=hidden,
        num_layers=12 if hidden > 64 else 2,
        num_heads=hidden // 64,
        head_dim=64,
        ffn_size=4 * hidden,
        max_positions=256,
    )
