"""Two local tokenizers: a compact one made from a few words, and a byte-level one in the Qwen3 layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from palaestra.agents.renderers.compact import CompactRenderer
from palaestra.agents.renderers.family import FamilyRenderer
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import ToolSpec

TEXTS = ["find order 12 of ann", "close ticket 7 : done", "max ( t , 5 )"] * 2
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

TOOLS = (
    ToolSpec(
        name="find",
        description="Find an order.",
        parameters={
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "number": {"type": "integer"},
                "is_open": {"type": "boolean"},
                "price": {"type": "number"},
                "level": {"enum": ["low", "high"]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        },
    ),
    ToolSpec(name="done", description="Say that all is done.", parameters={"type": "object", "properties": {}}),
)


@pytest.fixture(scope="session")
def compact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(TEXTS, tmp_path_factory.mktemp("compact"))


@pytest.fixture(scope="session")
def compact(compact_folder: Path) -> CompactRenderer:
    return CompactRenderer.from_folder(compact_folder)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level, without merges, with the control tokens of Qwen3; a third of them not marked special."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_PLAIN])
    folder = tmp_path_factory.mktemp("qwen")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family(qwen_folder: Path) -> FamilyRenderer:
    from transformers import AutoTokenizer

    return FamilyRenderer(AutoTokenizer.from_pretrained(qwen_folder), "qwen3")
