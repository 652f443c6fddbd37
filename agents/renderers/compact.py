"""The chat format of models made from scratch: one control token per role, arguments by position.

    <user> text <tool> text <assistant> <call> name <arg> value <arg> value </call>
    <user> text <assistant> text <end>

Invariants: prompts only ever grow; only control tokens written by this module are control tokens, because
text is encoded with special tokens switched off; `parse` inverts `encode_reply` and calls everything else
malformed, never raising.

Tools are not rendered: a small model learns them from demonstrations, and its context stays short.
Arguments stand in the order of the schema's properties, an omitted one as `<none>`, trailing ones not at all.
A value whose schema says string is written as it is, any other as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from palaestra.errors import ConfigError, PolicyError
from palaestra.types import JsonObject, Message, ToolCall, ToolSpec

PAD, CALL, ARG, CALL_END, END, NONE = "<pad>", "<call>", "<arg>", "</call>", "<end>", "<none>"
ROLE_TOKENS: Mapping[str, str] = {role: f"<{role}>" for role in ("system", "user", "tool", "assistant")}
CONTROL_TOKENS = (PAD, *ROLE_TOKENS.values(), CALL, ARG, CALL_END, END, NONE)

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<' ~ m['role'] ~ '>' }}"
    "{{ m['content'] or '' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% if m['tool_calls'] %}"
    "{% set f = m['tool_calls'][0].get('function', m['tool_calls'][0]) %}"
    "{{ '<call>' ~ f['name'] }}"
    "{% for v in f['arguments'].values() %}{{ '<arg>' ~ (v if v is string else v | tojson) }}{% endfor %}"
    "{{ '</call>' }}"
    "{% else %}{{ '<end>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""The same format as a Jinja template, for other tools that load the model. Unlike the renderer, a template
cannot keep control tokens spelled out in an observation from being read as control tokens."""


class CompactRenderer:
    """Renders, extends and parses the compact format with one tokenizer."""

    num_blind = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}
        missing = [token for token, number in ids.items() if number is None]
        if missing:
            raise ConfigError(f"not a compact tokenizer: no {', '.join(missing)}; make one with make_tokenizer()")
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # text that spells a control token stays text
        self._ids: dict[str, int] = {token: int(number) for token, number in ids.items() if number is not None}
        self._controls = frozenset(self._ids.values())
        self._num_tokens = tokenizer.get_vocab_size()
        self.stop_ids: tuple[int, ...] = (self._ids[CALL_END], self._ids[END])

    @classmethod
    def from_folder(cls, folder: Path) -> CompactRenderer:
        """The renderer of a saved tokenizer; raises `ConfigError` when there is none."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"no such tokenizer: {path}")
        return cls(Tokenizer.from_file(str(path)))

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """Ids of the conversation so far and the assistant's header; `tools` only matter for its earlier calls."""
        ids: list[int] = []
        for message in messages:
            ids.append(self._ids[ROLE_TOKENS[message.role]])
            is_reply = message.role == "assistant"
            ids.extend(self.encode_reply(message, tools) if is_reply else self._encode(message.content))
        return [*ids, self._ids[ROLE_TOKENS["assistant"]]]

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """`ids`, closed with `<end>` where the reply was cut, then the new messages and the assistant's header."""
        if any(message.role == "assistant" for message in messages):
            raise PolicyError("extend takes what the environment said; the assistant's words are in the ids already")
        closing = [] if ids and ids[-1] in self.stop_ids else [self._ids[END]]
        return [*ids, *closing, *self.start(messages, ())]

    def parse(self, ids: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        """The message that the ids spell exactly, or one malformed call that keeps their text."""
        try:
            return self._parse(list(ids), tools)
        except _MalformedError:
            known = [number for number in ids if 0 <= number < self._num_tokens]
            text = self._decode(known) or "(nothing)"
            return Message("assistant", tool_calls=(ToolCall(name="", malformed=text),))

    def encode_reply(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        """Ids of a text or of one call, stop token included.

        Raises `PolicyError` for what the format cannot say: several calls, unknown tools or arguments.
        """
        text = self._encode(message.content)
        if not message.tool_calls:
            return [*text, self._ids[END]]
        if len(message.tool_calls) > 1:
            raise PolicyError(f"the compact format has one call in a message, not {len(message.tool_calls)}")
        call = message.tool_calls[0]
        spec = _find(call.name, tools)
        if spec is None or call.malformed:
            raise PolicyError(
                f"the compact format cannot say a call of {call.name!r}: {call.malformed or 'no such tool'}"
            )
        return [*text, self._ids[CALL], *self._encode(call.name), *self._arguments(call, spec), self._ids[CALL_END]]

    def _arguments(self, call: ToolCall, spec: ToolSpec) -> list[int]:
        fields = _properties(spec)
        unknown = sorted(set(call.arguments) - set(fields))
        if unknown:
            raise PolicyError(f"{call.name} has no parameter {unknown[0]!r}")
        given = [position for position, name in enumerate(fields) if name in call.arguments]
        ids: list[int] = []
        for name in list(fields)[: given[-1] + 1 if given else 0]:
            ids.append(self._ids[ARG])
            if name in call.arguments:
                ids.extend(self._encode(_write(call.arguments[name], fields[name])))
            else:
                ids.append(self._ids[NONE])
        return ids

    def _parse(self, ids: list[int], tools: Sequence[ToolSpec]) -> Message:
        if not ids or not all(0 <= number < self._num_tokens for number in ids):
            raise _MalformedError
        *body, stop = ids
        if stop == self._ids[END]:
            return Message("assistant", self._text(body))
        if stop != self._ids[CALL_END] or self._ids[CALL] not in body:
            raise _MalformedError
        at = body.index(self._ids[CALL])
        name, *values = _split(body[at + 1 :], self._ids[ARG])
        spec = _find(self._text(name), tools)
        if spec is None:
            raise _MalformedError
        call = ToolCall(name=spec.name, arguments=self._read_arguments(values, spec))
        return Message("assistant", self._text(body[:at]), tool_calls=(call,))

    def _read_arguments(self, values: list[list[int]], spec: ToolSpec) -> dict[str, Any]:
        fields = _properties(spec)
        if len(values) > len(fields):
            raise _MalformedError
        given = zip(fields.items(), values, strict=False)
        none = [self._ids[NONE]]
        return {name: _read(self._text(value), schema) for (name, schema), value in given if value != none}

    def _text(self, ids: Sequence[int]) -> str:
        if not self._controls.isdisjoint(ids):
            raise _MalformedError
        return self._decode(ids)

    def _encode(self, text: str) -> list[int]:
        portable = text.encode("utf-8", "replace").decode()  # a lone surrogate has no bytes to encode
        return list(self._tokenizer.encode(portable, add_special_tokens=False).ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _MalformedError(Exception):
    """The ids do not spell a message."""


def _find(name: str, tools: Sequence[ToolSpec]) -> ToolSpec | None:
    return next((tool for tool in tools if tool.name == name), None)


def _properties(spec: ToolSpec) -> dict[str, JsonObject]:
    return dict(spec.parameters.get("properties", {}))


def _split(ids: Sequence[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for number in ids:
        if number == separator:
            parts.append([])
        else:
            parts[-1].append(number)
    return parts


def _is_text(schema: JsonObject) -> bool:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return schema.get("type") == "string" or (bool(values) and all(isinstance(value, str) for value in values))


def _write(value: object, schema: JsonObject) -> str:
    if _is_text(schema):
        if not isinstance(value, str):
            raise PolicyError(f"an argument must be a string, not {value!r}")
        return value
    return json.dumps(value, ensure_ascii=False)


def _read(text: str, schema: JsonObject) -> Any:
    if _is_text(schema):
        return text
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _MalformedError from error
    types: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "boolean": (bool,)}
    wanted = types.get(str(schema.get("type")))
    if wanted is not None and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        raise _MalformedError
    return value


def _refuse_constant(name: str) -> None:
    raise _MalformedError(f"{name} is not JSON")
