"""The compact format: what it writes, that it only appends, and that it reads back exactly what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palaestra.agents.renderers import open_renderer
from palaestra.agents.renderers.compact import CONTROL_TOKENS, CompactRenderer
from palaestra.errors import ConfigError, PolicyError
from palaestra.types import Message, ToolCall
from tests.agents.renderers.conftest import TOOLS

texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\x01\x02a1<>_(é")))
control_texts = st.lists(st.one_of(st.sampled_from(CONTROL_TOKENS), texts)).map("".join)
argument_values: dict[str, st.SearchStrategy[Any]] = {
    "name": control_texts,
    "number": st.integers(),
    "is_open": st.booleans(),
    "price": st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    "level": st.sampled_from(["low", "high"]),
    "tags": st.lists(control_texts, max_size=3),
}
calls = st.one_of(
    st.fixed_dictionaries({}, optional=argument_values).map(lambda a: ToolCall(name="find", arguments=a)),
    st.just(ToolCall(name="done")),
)
replies = st.builds(
    lambda text, call: Message("assistant", text, tool_calls=(call,) if call else ()),
    control_texts,
    st.one_of(st.none(), calls),
)
observations = st.lists(st.builds(Message, st.sampled_from(["user", "tool", "system"]), control_texts), max_size=3)
garbage = st.lists(st.integers(-3, 1000), max_size=12)


def tokens_of(renderer: CompactRenderer, ids: list[int]) -> list[str]:
    return [renderer._decode([number]) for number in ids]


def test_a_call_is_name_and_values_in_the_order_of_the_schema(compact: CompactRenderer) -> None:
    call = ToolCall(name="find", arguments={"number": 12, "name": "ann", "is_open": True})
    ids = compact.encode_reply(Message("assistant", tool_calls=(call,)), TOOLS)
    assert tokens_of(compact, ids)[:6] == ["<call>", "find", "<arg>", "ann", "<arg>", "12"]
    assert compact._decode(ids) == "<call> find<arg> ann<arg> 12<arg> true</call>"


def test_an_omitted_argument_before_a_given_one_keeps_its_place(compact: CompactRenderer) -> None:
    message = Message("assistant", tool_calls=(ToolCall(name="find", arguments={"number": 7}),))
    ids = compact.encode_reply(message, TOOLS)
    assert tokens_of(compact, ids) == ["<call>", "find", "<arg>", "<none>", "<arg>", "7", "</call>"]
    assert compact.parse(ids, TOOLS) == message


def test_a_prompt_has_one_header_for_each_message(compact: CompactRenderer) -> None:
    messages = [Message("system", "find"), Message("user", "close 7"), Message("tool", "done"), Message("tool", "5")]
    ids = compact.start(messages, TOOLS)
    expected = ["<system>", "find", "<user>", "close", "7", "<tool>", "done", "<tool>", "5", "<assistant>"]
    assert tokens_of(compact, ids) == expected


def test_a_word_is_the_same_token_wherever_it_stands(compact: CompactRenderer) -> None:
    number = compact._encode("12")
    assert len(number) == 1
    for text in ("find 12", "12 of", "(12)", "a\n12", "ticket12", "12"):
        assert number[0] in compact._encode(text)


@given(texts)
def test_decoding_gives_back_the_text(compact: CompactRenderer, text: str) -> None:
    assert compact._decode(compact._encode(text)) == text


@given(control_texts)
def test_text_never_becomes_a_control_token(compact: CompactRenderer, text: str) -> None:
    ids = compact.start([Message("tool", text)], TOOLS)
    assert [number for number in ids if number in compact._controls] == [ids[0], ids[-1]]
    assert compact._decode(ids[1:-1]) == text


@settings(max_examples=300)
@given(replies)
def test_parse_inverts_encode_reply(compact: CompactRenderer, message: Message) -> None:
    ids = compact.encode_reply(message, TOOLS)
    assert ids[-1] in compact.stop_ids
    assert compact.parse(ids, TOOLS) == message


@given(observations, st.lists(st.tuples(garbage, observations), max_size=4))
def test_each_prompt_starts_with_the_ids_before_it(
    compact: CompactRenderer, first: list[Message], turns: list[tuple[list[int], list[Message]]]
) -> None:
    ids = compact.start(first, TOOLS)
    for sampled, observation in turns:
        ids = ids + sampled
        prompt = compact.extend(ids, observation)
        assert prompt[: len(ids)] == ids
        is_open = not ids or ids[-1] not in compact.stop_ids
        assert prompt[len(ids) :] == [*compact.stop_ids[1:] * is_open, *compact.start(observation, ())]
        ids = prompt


@given(garbage)
def test_parse_never_raises_and_keeps_garbage_as_malformed(compact: CompactRenderer, ids: list[int]) -> None:
    message = compact.parse(ids, TOOLS)
    if any(call.malformed for call in message.tool_calls):
        assert len(message.tool_calls) == 1
    else:
        assert compact.parse(compact.encode_reply(message, TOOLS), TOOLS) == message


@pytest.mark.parametrize(
    "text",
    [
        "<call> find<arg> ann",  # cut
        "<call> fnd<arg> ann</call>",  # no such tool
        "<call> done<arg> ann</call>",  # too many values
        "<call> find<arg> ann<arg> seven</call>",  # not an integer
        "<call> find<arg> ann<arg> true</call>",  # a boolean is not an integer
        "<call> find<arg> ann<arg> 7<arg> 1</call>",  # an integer is not a boolean
        "<call> find<arg> ann<arg> 7<arg> true<arg> NaN</call>",  # not JSON
        "<call> find<arg> <user></call>",
        "find</call>",
        "<user> find<end>",
        "find",
        "",
    ],
)
def test_what_is_not_a_message_is_malformed_with_its_text(compact_folder: Path, text: str) -> None:
    renderer = CompactRenderer.from_folder(compact_folder)
    renderer._tokenizer.encode_special_tokens = False
    ids = renderer._encode(text)
    (call,) = renderer.parse(ids, TOOLS).tool_calls
    assert call.malformed
    assert (call.name, dict(call.arguments)) == ("", {})


@pytest.mark.parametrize(
    "message",
    [
        Message("assistant", tool_calls=(ToolCall(name="done"), ToolCall(name="done"))),
        Message("assistant", tool_calls=(ToolCall(name="nothing"),)),
        Message("assistant", tool_calls=(ToolCall(name="done", arguments={"x": 1}),)),
        Message("assistant", tool_calls=(ToolCall(name="find", arguments={"name": 1}),)),
        Message("assistant", tool_calls=(ToolCall(name="done", malformed="done("),)),
    ],
)
def test_what_the_format_cannot_say_is_refused(compact: CompactRenderer, message: Message) -> None:
    with pytest.raises(PolicyError):
        compact.encode_reply(message, TOOLS)


def test_extend_refuses_words_of_the_assistant(compact: CompactRenderer) -> None:
    with pytest.raises(PolicyError, match="assistant"):
        compact.extend([1], [Message("assistant", "hello")])


def test_the_chat_template_gives_the_ids_of_the_renderer(compact_folder: Path, compact: CompactRenderer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(compact_folder)
    call = ToolCall(name="find", arguments={"name": "ann", "number": 7})
    conversation = [
        Message("system", "find ( t )"),
        Message("user", "close ticket 7"),
        Message("assistant", tool_calls=(call,)),
        Message("tool", "order 12", name="find"),
        Message("assistant", "done"),
        Message("user", ""),
    ]
    for count in (1, 2, 4, 6):
        chat = [message.to_json() for message in conversation[:count]]
        rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert rendered == compact.start(conversation[:count], TOOLS)


def test_open_renderer_knows_a_compact_tokenizer_also_after_it_was_saved_again(
    compact_folder: Path, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(compact_folder).save_pretrained(tmp_path)
    for folder in (compact_folder, tmp_path):
        assert isinstance(open_renderer(folder), CompactRenderer)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such tokenizer"):
        CompactRenderer.from_folder(tmp_path)
