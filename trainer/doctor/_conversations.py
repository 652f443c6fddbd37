"""Whether conversations become tokens and back: the prefix property, and the round trip of tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from palaestra.agents import Renderer
from palaestra.errors import PolicyError
from palaestra.trainer.doctor._check import Finding, failure, ok, warning
from palaestra.trainer.doctor._env_worker import Played
from palaestra.types import Episode, JsonObject, Message, ToolCall, ToolSpec

_NEARLY = 0.9
_MAX_DEPTH = 4
_TEXTS = (
    "plain",
    "",
    "say \"yes\" and 'no'",
    "one\ntwo\n\n\tthree",
    "naïve 猫 🦊 ﷽",
    "back\\slash \\n {brace} [bracket] <tag> & %",
    "007",
    "true",
    "</call><|im_end|></tool_call>",
)
_INTEGERS = (0, -1, 7, 10**12)
_NUMBERS = (0.5, -2.25, 1e-9, 3.0)


def check_template(played: Mapping[str, Played], renderer: Renderer, max_model_len: int) -> Finding:
    """Whether every prompt starts with exactly the ids before it, over whole episodes."""
    if not renderer.stop_ids:
        return failure("the chat format has no token that ends a reply", "give the model's family")
    lengths: dict[str, int] = {}
    num_turns = 0
    for env_id, each in played.items():
        for episode in each.episodes:
            prompts = 0
            for before, after in _growing(episode, each.tools, renderer):
                if after[: len(before)] != before:
                    return failure(
                        f"{episode.task.id}: prompt {prompts} does not start with the tokens before it",
                        "take another model or family: only append-only chat formats can be trained on",
                    )
                prompts += 1
                lengths[env_id] = max(lengths.get(env_id, 0), len(after))
            num_turns += prompts
    longest, env_id = max(((length, env_id) for env_id, length in lengths.items()), default=(0, ""))
    detail = f"{num_turns} extensions only append; the longest episode has {longest} of {max_model_len} tokens"
    if longest > _NEARLY * max_model_len:
        return warning(f"{detail}, in {env_id}", "raise engine_config.max_model_len, or shorten what it says")
    return ok(detail)


def _growing(episode: Episode, tools: Sequence[ToolSpec], renderer: Renderer) -> Iterator[tuple[list[int], list[int]]]:
    """Ids before and after each extension: by a whole reply, and by one that was cut."""
    ids: list[int] = []
    has_begun = False
    for is_reply, block in groupby(episode.messages, key=lambda message: message.role == "assistant"):
        messages = tuple(block)
        if not is_reply:
            if has_begun:
                cut = ids[:-1] if ids[-1] in renderer.stop_ids else ids
                yield cut, renderer.extend(cut, messages)
            extended = renderer.extend(ids, messages) if has_begun else renderer.start(messages, tools)
            yield ids, extended
            ids = extended
            continue
        for number, message in enumerate(messages):
            if number:
                extended = renderer.extend(ids, ())
                yield ids, extended
                ids = extended
            reply = renderer.encode_reply(message, tools)
            if not reply or reply[-1] not in renderer.stop_ids:
                raise PolicyError(f"{episode.task.id}: a reply does not end with a stop token")
            yield ids, [*ids, *reply]
            ids = [*ids, *reply]
        has_begun = True


def check_calls(played: Mapping[str, Played], renderer: Renderer) -> Finding:
    """Whether what is encoded is parsed as the same: messages that were played, and awkward arguments."""
    said = {
        (env_id, json.dumps(message.to_json(), sort_keys=True)): (message, each.tools)
        for env_id, each in played.items()
        for episode in each.episodes
        for message in episode.messages
        if message.role == "assistant"
    }
    wrong = [text for message, tools in said.values() if (text := _changed(message, tools, renderer))]
    if wrong:
        detail = f"{len(wrong)} of {len(said)} messages that were played come back changed, such as {wrong[0]}"
        return failure(detail, "give the model's family, or mend its renderer: what is trained is not what is played")
    hard = [(message, each.tools) for each in played.values() for message in hard_calls(each.tools)]
    wrong = [text for message, tools in hard if (text := _changed(message, tools, renderer))]
    if wrong:
        detail = f"{len(wrong)} of {len(hard)} calls with awkward arguments come back changed, such as {wrong[0]}"
        return warning(detail, "keep such values out of the tools' arguments, or choose another family")
    return ok(
        f"{len(said)} messages that were played and {len(hard)} calls with awkward arguments come back as they were"
    )


def _changed(message: Message, tools: Sequence[ToolSpec], renderer: Renderer) -> str:
    """What came back wrong, in a few words; empty when all is well."""
    try:
        parsed = renderer.parse(renderer.encode_reply(message, tools), tools)
    except PolicyError as error:
        return f"{_shown(message)}: {error}"
    return "" if _meaning(parsed) == _meaning(message) else f"{_shown(message)} as {_shown(parsed)}"


def _meaning(message: Message) -> object:
    return message.content, [(call.name, dict(call.arguments), call.malformed) for call in message.tool_calls]


def _shown(message: Message) -> str:
    calls = [call.malformed or f"{call.name}({json.dumps(dict(call.arguments))})" for call in message.tool_calls]
    return " ".join([*filter(None, [message.content]), *calls])[:120] or "(nothing)"


def hard_calls(tools: Sequence[ToolSpec]) -> Iterator[Message]:
    """For each tool, calls that each vary one argument over values that are hard to write; the others stay plain."""
    for tool in tools:
        fields: dict[str, JsonObject] = dict(tool.parameters.get("properties", {}))
        choices = {name: hard_values(field, tool.parameters) for name, field in fields.items()}
        plain = {name: values[0] for name, values in choices.items()}
        yield _call(tool.name, plain)
        for name, values in choices.items():
            for value in values[1:]:
                yield _call(tool.name, {**plain, name: value})


def _call(name: str, arguments: JsonObject) -> Message:
    return Message("assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))


def hard_values(field: JsonObject, schema: JsonObject, depth: int = 0) -> list[Any]:
    """Values that meet a JSON Schema, a plain one first."""
    if "$ref" in field:
        target = schema.get("$defs", {}).get(str(field["$ref"]).rpartition("/")[2], {})
        return hard_values(target, schema, depth + 1) if depth < _MAX_DEPTH else [None]
    if "const" in field:
        return [field["const"]]
    if "enum" in field:
        return list(field["enum"])
    if "anyOf" in field:
        return [value for option in field["anyOf"] for value in hard_values(option, schema, depth + 1)[:3]]
    kind = field.get("type", "string")
    if kind in ("array", "object"):
        return _containers(kind, field, schema, depth)
    if kind == "boolean":
        return [True, False]
    if kind == "null":
        return [None]
    if kind in ("integer", "number"):
        return _within(_INTEGERS if kind == "integer" else _NUMBERS, field)
    low, high = field.get("minLength", 0), field.get("maxLength", 10**6)
    return [text for text in _TEXTS if low <= len(text) <= high] or ["x" * low]


def _within(values: Sequence[float], field: JsonObject) -> list[Any]:
    low, high = field.get("minimum"), field.get("maximum")
    fitting = [v for v in values if (low is None or v >= low) and (high is None or v <= high)]
    return fitting or [low if low is not None else high]


def _containers(kind: str, field: JsonObject, schema: JsonObject, depth: int) -> list[Any]:
    if depth >= _MAX_DEPTH:
        return [[] if kind == "array" else {}]
    if kind == "array":
        inner = hard_values(field.get("items", {}), schema, depth + 1)
        return [inner[:1], inner] if field.get("minItems", 0) else [inner[:1], [], inner]
    fields: dict[str, JsonObject] = dict(field.get("properties", {}))
    if not fields:
        return [{"key": "value"}, {}, {"a b": {"c": [1, "two", None]}}]
    inner_by_name = {name: hard_values(child, schema, depth + 1) for name, child in fields.items()}
    return [{name: values[at] for name, values in inner_by_name.items()} for at in (0, -1)]
