"""Keeping text from being read as control tokens, for renderers that encode scaffolding and text in one call.

Invariant: text that went through `break_controls` and is then encoded by `PlainTextTokenizer` contains no
added token, and decodes to the original text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BREAK = "\ufdd0\ufdd1"  # two noncharacters, which Unicode reserves for uses such as this
_LONE_BREAK = "\ufffd"


def break_controls(text: str, controls: re.Pattern[str]) -> str:
    """`text` with a break inside everything that spells a control token."""
    text = text.replace(_BREAK, _LONE_BREAK)
    while (broken := controls.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)) != text:
        text = broken  # once more: two control tokens may overlap
    return text


class PlainTextTokenizer:
    """A Hugging Face tokenizer that encodes the parts around a break one by one, so that no token spans it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.name_or_path: str = str(tokenizer.name_or_path)
        self.unk_token_id: int | None = tokenizer.unk_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.chat_template: Any = getattr(tokenizer, "chat_template", None)
        tokens = sorted((t for t in tokenizer.get_added_vocab() if len(t) > 1), key=len, reverse=True)
        self.controls: re.Pattern[str] = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def encode(self, text: str, *args: Any, **kwargs: Any) -> list[int]:
        """Ids of the text, special tokens recognised except where a break stands in them."""
        kwargs["add_special_tokens"] = False
        parts = [part for part in text.split(_BREAK) if part]
        return [number for part in parts for number in self._tokenizer.encode(part, *args, **kwargs)]

    def decode(self, token_ids: Sequence[int], *args: Any, **kwargs: Any) -> str:
        """The text of the ids, control tokens spelled out."""
        kwargs.setdefault("skip_special_tokens", False)
        return str(self._tokenizer.decode(token_ids, *args, **kwargs))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """As the tokenizer does."""
        return self._tokenizer.convert_tokens_to_ids(tokens)
