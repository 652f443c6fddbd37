"""The wrapped `renderers` package, on a tokenizer in the Qwen3 layout: append-only, and nothing gets in by text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palaestra.agents.renderers import open_renderer
from palaestra.agents.renderers.family import FamilyRenderer
from palaestra.errors import ConfigError, PolicyError
from palaestra.types import Message, ToolCall
from tests.agents.renderers.conftest import QWEN_PLAIN, QWEN_SPECIAL, TOOLS

CONTROLS = (*QWEN_SPECIAL, *QWEN_PLAIN)
words = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12)
control_texts = st.lists(st.one_of(st.sampled_from([*CONTROLS, "<|im_<|im_end|>"]), words), max_size=4).map("".join)
arguments = st.fixed_dictionaries(
    {}, optional={"name": control_texts, "number": st.integers(), "price": st.floats(0, 9)}
)
calls = st.one_of(arguments.map(lambda a: ToolCall(name="find", arguments=a)), st.just(ToolCall(name="done")))
plain_texts = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=8)
replies = st.builds(
    lambda text, some: Message("assistant", text, tool_calls=tuple(some)), plain_texts, st.lists(calls, max_size=2)
)
observations = st.lists(st.builds(Message, st.sampled_from(["user", "tool"]), control_texts), min_size=1, max_size=3)
garbage = st.lists(st.integers(0, 256 + len(CONTROLS) - 1), max_size=12)


def test_the_prompt_has_the_tools_and_ends_where_the_assistant_begins(family: FamilyRenderer) -> None:
    text = family._tokenizer.decode(family.start([Message("user", "find ann")], TOOLS))
    assert '"name": "find"' in text
    assert text.endswith("<|im_start|>user\nfind ann<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_thinking_prompt_leaves_the_thoughts_to_the_model(qwen_folder: Path) -> None:
    renderer = FamilyRenderer(AutoTokenizer.from_pretrained(qwen_folder), "qwen3", is_thinking=True)
    assert renderer._tokenizer.decode(renderer._opening).endswith("<|im_start|>assistant\n")


@settings(max_examples=60)
@given(replies)
def test_parse_inverts_encode_reply(family: FamilyRenderer, message: Message) -> None:
    ids = family.encode_reply(message, TOOLS)
    assert ids[-1] in family.stop_ids
    assert family.parse(ids, TOOLS) == message


@settings(max_examples=60)
@given(observations, st.lists(st.tuples(garbage, observations), max_size=3))
def test_each_prompt_starts_with_the_ids_before_it(
    family: FamilyRenderer, first: list[Message], turns: list[tuple[list[int], list[Message]]]
) -> None:
    ids = family.start(first, TOOLS)
    for sampled, observation in turns:
        ids = ids + sampled
        prompt = family.extend(ids, observation)
        assert prompt[: len(ids)] == ids
        assert prompt[-len(family._opening) :][-3:] == family._opening[-3:]
        ids = prompt


@settings(max_examples=60)
@given(control_texts)
def test_text_never_becomes_a_control_token(family: FamilyRenderer, text: str) -> None:
    innocent = family.start([Message("user", "x"), Message("tool", "x")], TOOLS)
    rendered = family.start([Message("user", text), Message("tool", text)], TOOLS)
    controls = set(family._tokenizer.convert_tokens_to_ids(list(CONTROLS)))
    assert [n for n in rendered if n in controls] == [n for n in innocent if n in controls]
    assert family._tokenizer.decode(rendered).count(text) >= 2


@settings(max_examples=200)
@given(garbage)
def test_parse_never_raises(family: FamilyRenderer, ids: list[int]) -> None:
    assert family.parse(ids, TOOLS).role == "assistant"


def test_a_call_that_does_not_parse_is_malformed_with_its_text(family: FamilyRenderer) -> None:
    ids = family._tokenizer.encode('<tool_call>\n{"name": "find", "arg\n</tool_call><|im_end|>')
    (call,) = family.parse(ids, TOOLS).tool_calls
    assert call.malformed == '{"name": "find", "arg'


def test_a_cut_reply_is_closed_before_the_next_turn(family: FamilyRenderer) -> None:
    ids = family.start([Message("user", "x")], ()) + family._tokenizer.encode("I was about to")
    prompt = family.extend(ids, [Message("user", "go on")])
    assert family._tokenizer.decode(prompt[len(ids) :]).startswith("<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n")


def test_a_malformed_call_cannot_be_said(family: FamilyRenderer) -> None:
    with pytest.raises(PolicyError, match="malformed"):
        family.encode_reply(Message("assistant", tool_calls=(ToolCall(name="", malformed="{"),)), TOOLS)


def test_an_unknown_model_is_refused_with_what_to_do(qwen_folder: Path) -> None:
    with pytest.raises(ConfigError, match="family='qwen3'"):
        open_renderer(qwen_folder)


def test_a_mistyped_family_is_refused_with_the_nearest(qwen_folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'qwen3'"):
        open_renderer(qwen_folder, family="qwn3")


def test_a_tokenizer_of_another_family_is_refused(qwen_folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit the glm-5 chat format"):
        open_renderer(qwen_folder, family="glm-5")


def test_a_format_without_bridge_is_refused(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from renderers.qwen3 import Qwen3Renderer

    def refuse(*args: object, **kwargs: object) -> None:
        return None

    monkeypatch.setattr(Qwen3Renderer, "bridge_to_next_turn", refuse)
    with pytest.raises(ConfigError, match="rewrites history after a tool message"):
        open_renderer(qwen_folder, family="qwen3")


def test_a_format_that_hides_tools_is_refused(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from renderers.qwen3 import Qwen3Renderer

    render_ids = Qwen3Renderer.render_ids

    def without_tools(self: Any, messages: Any, *, tools: Any = None, add_generation_prompt: bool = False) -> Any:
        return render_ids(self, messages, add_generation_prompt=add_generation_prompt)

    monkeypatch.setattr(Qwen3Renderer, "render_ids", without_tools)
    with pytest.raises(ConfigError, match="does not show tools"):
        open_renderer(qwen_folder, family="qwen3")


def test_the_tokenizer_folder_may_name_its_family(qwen_folder: Path, tmp_path: Path) -> None:
    for path in qwen_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"palaestra": {"family": "qwen3"}}))
    assert isinstance(open_renderer(tmp_path), FamilyRenderer)
