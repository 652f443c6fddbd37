"""Models made from scratch: the tokenizer knows everything, the same seed gives the same bytes, everybody loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from palaestra.agents.renderers.compact import CONTROL_TOKENS, END, PAD
from palaestra.errors import ConfigError
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer

TEXTS = ["close ticket 12 of ann", "close ticket 7 of ben", "rare"]
SMALL = TinyModelConfig(num_layers=2, ffn_size=64, max_positions=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tokenizer(TEXTS, tmp_path / "model")


def test_frequent_words_and_small_integers_are_one_token(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["close", "ticket", "of", *map(str, range(100))]:
        assert len(tokenizer.encode(text).ids) == 1, text
    assert len(tokenizer.encode("rare").ids) == 5  # once is too rare: the space and its letters


def test_every_vocabulary_keeps_controls_bytes_and_integers_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(make_tokenizer(TEXTS, tmp_path, vocab_size=370) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 369  # 10 controls, 256 bytes, 100 integers, 3 words
    assert [tokenizer.id_to_token(number) for number in range(10)] == list(CONTROL_TOKENS)
    with pytest.raises(ConfigError, match="at least 366"):
        make_tokenizer(TEXTS, tmp_path, vocab_size=100)


def test_the_vocabulary_takes_the_most_frequent_words_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(
        str(make_tokenizer(["b b b a a", "c c"], tmp_path, vocab_size=368) / "tokenizer.json")
    )
    assert [tokenizer.id_to_token(number) for number in (366, 367)] == ["Ġb", "Ġa"]


def test_transformers_loads_tokenizer_and_model(folder: Path) -> None:
    make_model(folder, SMALL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype is torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("changes", [{}, {"start": "random"}, {"start": "random", "architecture": "qwen3"}])
def test_the_same_seed_gives_the_same_bytes(folder: Path, changes: dict[str, str]) -> None:
    size = SMALL.model_copy(update=changes)
    weights = [(make_model(folder, size, seed=seed) / "model.safetensors").read_bytes() for seed in (1, 1, 2)]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    one, two = (make_tokenizer(TEXTS, tmp_path / name) for name in ("one", "two"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_model_needs_a_tokenizer_and_a_head_that_vllm_computes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        make_model(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="head_dim must be one of"):
        TinyModelConfig.parse({"head_dim": 16})
    with pytest.raises(ConfigError, match="'copying' needs architecture 'llama'"):
        TinyModelConfig.parse({"architecture": "qwen3"})
    with pytest.raises(ConfigError, match="needs 4 heads"):
        TinyModelConfig.parse({"num_heads": 2})
    with pytest.raises(ConfigError, match="divisible by head_dim 32"):
        TinyModelConfig.parse({"hidden_size": 144})


def attention_of(folder: Path, layer: int, ids: list[int]) -> torch.Tensor:
    """Attention probabilities of a layer, shape (heads, query, key)."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        attention: torch.Tensor = model(torch.tensor([ids]), output_attentions=True).attentions[layer][0]
    return attention


def test_the_copying_start_looks_one_and_two_tokens_back(folder: Path) -> None:
    make_model(folder, seed=1)
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:40].tolist()
    attention = attention_of(folder, 0, ids)
    for head, distance in ((0, 1), (1, 2)):
        targets = attention[head].argmax(-1)[distance:].tolist()
        assert targets == list(range(40 - distance))


@pytest.mark.parametrize("layer", [1, 2])
def test_the_copying_start_finds_what_followed_an_equal_token(folder: Path, layer: int) -> None:
    make_model(folder, seed=1)
    once = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:12].tolist()
    seen = attention_of(folder, layer, [*once, *once[:6]])[:2, -1]  # the last token stood at position 5 before
    assert seen.argmax(-1).tolist() == [6, 6]
    assert bool((seen[:, 6] > 1.5 * seen.median(-1).values).all())


def test_the_tokenizer_beside_a_model_stays_ours(folder: Path) -> None:
    before = AutoTokenizer.from_pretrained(folder)("close ticket 12 (7)").input_ids
    make_model(folder, SMALL)
    assert AutoTokenizer.from_pretrained(folder)("close ticket 12 (7)").input_ids == before
