"""A tokenizer for a model made from scratch: words and small integers as single tokens, bytes for the rest.

Invariants: nothing is ever unknown, decoding gives back the exact text, and a word is the same token wherever
it stands. The last one is what makes copying learnable: were "7" in an observation another token than "7" in a
call, the model would have to learn every pair by heart. So every word carries the space before it, and where
there is none (at the start, after punctuation, a number after letters) a space is put in that decoding takes
away, after a joining byte except at the start.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from palaestra.agents.renderers import MARKER
from palaestra.agents.renderers.compact import CHAT_TEMPLATE, CONTROL_TOKENS, END, PAD
from palaestra.errors import ConfigError

_JOIN, _ESCAPED_JOIN = "\x01", "\x01\x02"
_GLUED = r"(?<=[^\sA-Za-z_\d])(?=[A-Za-z_\d])|(?<=\n)(?=[A-Za-z_\d])|(?<=[A-Za-z_])(?=\d)|(?<=\d)(?=[A-Za-z_])"
_PIECES = r"\x01|\x02| ?[A-Za-z_]+| ?\d{1,2}| ?[^\sA-Za-z_\d\x01\x02]+|\s"
_NUMBERS = tuple(f"Ġ{number}" for number in range(100))


def make_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int = 768, min_count: int = 2) -> Path:
    """Write a tokenizer made from `texts` to `folder` and return it; the same texts give the same bytes.

    Its vocabulary is the control tokens, the 256 bytes, the integers 0 to 99, and the most frequent words with
    at least `min_count` occurrences, at most `vocab_size` together. Raises `ConfigError` when that is too small.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*CONTROL_TOKENS, *alphabet, *_NUMBERS]
    if vocab_size < len(fixed):
        raise ConfigError(f"vocab_size must be at least {len(fixed)}, not {vocab_size}")
    known = set(fixed)
    words = [word for word in _frequent(texts, min_count) if word not in known]
    vocab = {token: number for number, token in enumerate([*fixed, *words[: vocab_size - len(fixed)]])}
    _save(_build(vocab), folder)
    return folder


def _build(vocab: dict[str, int]) -> Tokenizer:
    # No merges: a piece is one token when it is in the vocabulary as a whole, else its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    escape = normalizers.Replace(_JOIN, _ESCAPED_JOIN)
    join = normalizers.Replace(Regex(_GLUED), f"{_JOIN} ")
    tokenizer.normalizer = normalizers.Sequence([escape, join, normalizers.Prepend(" ")])
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    unjoin, unescape = decoders.Replace(f"{_JOIN} ", ""), decoders.Replace(_ESCAPED_JOIN, _JOIN)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), unjoin, unescape, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def _frequent(texts: Iterable[str], min_count: int) -> list[str]:
    splitter = _build({token: number for number, token in enumerate(CONTROL_TOKENS)})
    splitter.encode_special_tokens = True
    counts: Counter[str] = Counter()
    normalise, split = splitter.normalizer, splitter.pre_tokenizer
    assert normalise is not None
    assert split is not None
    for text in texts:
        counts.update(piece for piece, _ in split.pre_tokenize_str(normalise.normalize_str(text)))
    return sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "pad_token": PAD,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        MARKER: {"renderer": "compact"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
