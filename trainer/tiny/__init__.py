"""Small models made from scratch: a word-level tokenizer that knows every byte, and a random transformer."""

from palaestra.trainer.tiny._model import TinyModelConfig, make_model
from palaestra.trainer.tiny._tokenizer import make_tokenizer

__all__ = ["TinyModelConfig", "make_model", "make_tokenizer"]
