"""Published model families, through the typed renderers of the `renderers` package.

Invariants: `extend` returns exactly the given ids and then more, whatever was sampled; text of a message that
spells a control token is encoded as plain text. A family that cannot keep the first is refused when opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import renderers
from renderers.base import MODEL_RENDERER_MAP, create_renderer, load_tokenizer
from renderers.configs import config_from_name

from palaestra.agents._renderer import Renderer
from palaestra.agents.renderers._plain_text import PlainTextTokenizer, break_controls
from palaestra.config import nearest
from palaestra.errors import ConfigError, PolicyError
from palaestra.types import Message, ToolCall, ToolSpec

FAMILIES = tuple(sorted(set(MODEL_RENDERER_MAP.values())))
"""Chat formats that have a typed renderer; whether one can be extended is checked when it is opened."""

_OPENING = Message("user", "hello")
_PROBE_TOOL = ToolSpec(
    name="palaestra_probe", description="probe", parameters={"type": "object", "properties": {"x": {"type": "integer"}}}
)
_PARSER_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)


class FamilyRenderer:
    """The `Renderer` protocol over one typed renderer and its tokenizer."""

    def __init__(self, tokenizer: Any, family: str, *, is_thinking: bool = False) -> None:
        self._family = family
        self._tokenizer = PlainTextTokenizer(tokenizer)
        self._renderer = _create(self._tokenizer, family, is_thinking)
        self.num_blind = 0
        self.stop_ids: tuple[int, ...] = tuple(self._renderer.get_stop_token_ids())
        self._opening = self._prompt([_OPENING], ())
        self._check()

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """The family's full prompt, tools included, ending where the assistant begins to speak."""
        return self._prompt(messages, tools)

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """`ids`, closed if the reply was cut, then what the family puts between turns."""
        given = list(ids)
        closed = bool(given) and given[-1] in self.stop_ids
        prompt, last = (given[:-1], given[-1:]) if closed else (given, [])
        extended = self._bridge(prompt, last, messages)
        if extended is None or extended[: len(given)] != given:
            self.num_blind += 1
            extended = self._extend_blindly(given, last, messages)
        return extended

    def parse(self, ids: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        """The message that the ids spell; thoughts are left out, a call that does not parse is malformed."""
        kept = [number for number in ids if number >= 0]
        try:
            parsed = self._renderer.parse_response(kept, tools=_tools(tools), prompt_ids=self._opening)
        except _PARSER_ERRORS:  # the parser read arbitrary samples; whatever tripped it, the call is malformed
            text = str(self._tokenizer.decode(kept)) or "(nothing)"
            return Message("assistant", tool_calls=(ToolCall(name="", malformed=text),))
        calls = tuple(_to_call(call) for call in parsed.tool_calls)
        return Message("assistant", parsed.content or "", tool_calls=calls)

    def encode_reply(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        """Ids of a reply as the family writes it, up to its stop token.

        Raises `PolicyError` for a malformed call, and where the family renders a reply unlike its own prompt.
        """
        for call in message.tool_calls:
            if call.malformed:
                raise PolicyError(f"a malformed call cannot be rendered: {call.malformed!r}")
        prompt = self._prompt([_OPENING], tools)
        conversation = [self._to_chat(_OPENING), self._to_chat(message)]
        ids = list(self._renderer.render_ids(conversation, tools=_tools(tools)))
        stops = [position for position, number in enumerate(ids) if number in self.stop_ids]
        if ids[: len(prompt)] != prompt or not stops or stops[-1] < len(prompt):
            raise PolicyError(f"the {self._family} renderer does not continue its own prompt with this reply")
        return ids[len(prompt) : stops[-1] + 1]

    def _prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        chat = [self._to_chat(message) for message in messages]
        return list(self._renderer.render_ids(chat, tools=_tools(tools), add_generation_prompt=True))

    def _bridge(self, prompt: list[int], last: list[int], messages: Sequence[Message]) -> list[int] | None:
        chat = [self._to_chat(message) for message in messages]
        rendered = self._renderer.bridge_to_next_turn(prompt, last, chat)
        return None if rendered is None else list(rendered.token_ids)

    def _extend_blindly(self, given: list[int], last: list[int], messages: Sequence[Message]) -> list[int]:
        """The turn's ids as they follow a clean reply: for samples that the family would rather render anew."""
        clean = self._bridge(self._opening, last, messages)
        if clean is None:
            raise PolicyError(f"the {self._family} renderer cannot extend a conversation by {len(messages)} messages")
        return [*given, *clean[len(self._opening) + len(last) :]]

    def _to_chat(self, message: Message) -> dict[str, Any]:
        controls = self._tokenizer.controls
        chat: dict[str, Any] = {"role": message.role, "content": break_controls(message.content, controls)}
        if message.tool_calls:
            chat["tool_calls"] = [_from_call(call, controls) for call in message.tool_calls]
        if message.role == "tool":
            chat |= {"name": message.name, "tool_call_id": message.tool_call_id}
        return chat

    def _check(self) -> None:
        """Refuse at once what would fail in the middle of a run."""
        shown = str(self._tokenizer.decode(self._prompt([_OPENING], [_PROBE_TOOL])))
        if _PROBE_TOOL.name not in shown:
            raise ConfigError(f"the {self._family} chat format does not show tools; choose a model made for tool use")
        answers = (Message("tool", "ok", name=_PROBE_TOOL.name), Message("user", "go on"))
        for answer in answers:
            if self._bridge(self._opening, [self.stop_ids[0]], [answer]) is None:
                raise ConfigError(
                    f"the {self._family} chat format rewrites history after a {answer.role} message, so sampled tokens "
                    "could not be trained on as sampled; choose another model"
                )


def open_family(model: str, *, family: str | None, is_thinking: bool) -> Renderer:
    """The renderer of a published model; raises `ConfigError` with what to do when there is none."""
    if family is None:
        raise ConfigError(
            f"no append-only chat format is known for {model!r}: give its family, such as family='qwen3' "
            "(--family qwen3), or make a small model with `palaestra.trainer.tiny`"
        )
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {model!r}: {error}") from error
    return FamilyRenderer(tokenizer, family, is_thinking=is_thinking)


def _create(tokenizer: PlainTextTokenizer, family: str, is_thinking: bool) -> renderers.Renderer:
    if family not in FAMILIES:
        raise ConfigError(f"unknown model family {family!r}{nearest(family, list(FAMILIES))}")
    config = config_from_name(family)
    # "all" extends across user messages too; the template's own policy would render history anew there
    values: dict[str, Any] = {"thinking_retention": "all"}
    if "enable_thinking" in type(config).model_fields:
        values["enable_thinking"] = is_thinking
    try:
        return create_renderer(tokenizer, type(config)(**values))
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"this tokenizer does not fit the {family} chat format: {error}") from error


def _tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]] | None:
    return [tool.to_json() for tool in tools] or None


def _from_call(call: ToolCall, controls: re.Pattern[str]) -> dict[str, Any]:
    arguments = json.loads(break_controls(json.dumps(dict(call.arguments), ensure_ascii=False), controls))
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _to_call(call: renderers.ParsedToolCall) -> ToolCall:
    arguments = call.arguments
    if call.status is renderers.ToolCallParseStatus.OK and call.name and isinstance(arguments, dict):
        return ToolCall(name=call.name, arguments=arguments)
    return ToolCall(name=call.name or "", malformed=call.raw or "(nothing)")
