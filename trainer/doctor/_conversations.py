"""Whether conversations become tokens and back: the prefix property, and the round trip of tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from palaestra.agents import Renderer
from palaestra.errors import PolicyError
from palaestra.trainer.doctor._check import Finding, failure, ok, skipped, together, warning
from palaestra.trainer.doctor._env_worker import Played
from palaestra.trainer.doctor._hard_values import hard_values, meets
from palaestra.types import Episode, JsonObject, Message, ToolCall, ToolSpec

_NEARLY = 0.9


@dataclass(slots=True)
class Transcript:
    """A conversation of an expert in tokens, built turn by turn as a policy lives it, and what was seen on the way."""

    task_id: str
    env_id: str
    ids: list[int] = field(default_factory=list)
    num_turns: int = 0
    num_extensions: int = 0
    num_blind: int = 0
    rewritten_at: int | None = None
    """The first turn whose prompt does not start with the tokens before it."""
    differs_at: int | None = None
    """The first token that is another one when the conversation is rendered at once."""


def transcribe(played: Mapping[str, Played], renderer: Renderer) -> list[Transcript]:
    """Every expert's conversation; none where no reply can end."""
    if not renderer.stop_ids:
        return []
    return [
        _transcribe(episode, each.tools, renderer, env_id)
        for env_id, each in played.items()
        for episode in each.episodes
        if episode.messages
    ]


def judge_template(transcripts: Sequence[Transcript], renderer: Renderer, max_model_len: int) -> Finding:
    """Whether history stays as it was, turn by turn and rendered at once, and fits."""
    if not renderer.stop_ids:
        return failure("the chat format has no token that ends a reply", "give the model's family")
    if not transcripts:
        return skipped("no conversation was played to render")
    for each in transcripts:
        if each.rewritten_at is not None:
            return failure(
                f"{each.task_id}: prompt {each.rewritten_at} does not start with the tokens before it",
                "take another model or family: only append-only chat formats can be trained on",
            )
    longest = max(transcripts, key=lambda each: len(each.ids))
    num_extensions, num_blind = (sum(getattr(t, name) for t in transcripts) for name in ("num_extensions", "num_blind"))
    several = [each for each in transcripts if each.num_turns > 1]
    other = [each for each in several if each.differs_at is not None]
    findings = []
    if other:
        detail = (
            f"{len(other)} of {len(several)} conversations of several turns are other tokens when rendered at once, "
            f"such as {other[0].task_id} from token {other[0].differs_at} of {len(other[0].ids)} on"
        )
        findings.append(warning(detail, "serve it turn by turn, as here, or take a format that keeps earlier turns"))
    if num_blind:
        detail = f"{num_blind} of {num_extensions} extensions are blind: the format would have rewritten history"
        findings.append(warning(detail, "expect prompts that the model was not made for, or take another family"))
    room = f"the longest episode has {len(longest.ids)} of {max_model_len} tokens"
    if len(longest.ids) > _NEARLY * max_model_len:
        remedy = "raise engine_config.max_model_len, or shorten what it says"
        findings.append(warning(f"{room}, in {longest.env_id}", remedy))
    well = f"{num_extensions} extensions only append; {len(several)} conversations are the same rendered at once"
    return together(findings, f"{well}; {room}")


def _transcribe(episode: Episode, tools: Sequence[ToolSpec], renderer: Renderer, env_id: str) -> Transcript:
    seen = Transcript(episode.task.id, env_id)
    blind_before = renderer.num_blind
    prompt: list[int] = []
    num_messages = 0
    for step in _growing(episode, tools, renderer):
        if step.after[: len(step.before)] != step.before and seen.rewritten_at is None:
            seen.rewritten_at = seen.num_extensions
        seen.num_extensions += 1
        if not step.is_cut:
            seen.ids = step.after
        if step.num_messages:
            seen.num_turns, prompt, num_messages = seen.num_turns + 1, step.after, step.num_messages
    seen.num_blind = renderer.num_blind - blind_before
    whole = renderer.start(episode.messages[:num_messages], tools)
    seen.differs_at = None if prompt == whole else _first_difference(prompt, whole)
    return seen


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class _Step(NamedTuple):
    """Ids before and after an extension; `num_messages` are those of a whole prompt, 0 where `after` is none."""

    before: list[int]
    after: list[int]
    num_messages: int = 0
    is_cut: bool = False


def _growing(episode: Episode, tools: Sequence[ToolSpec], renderer: Renderer) -> Iterator[_Step]:
    """Each extension: by a whole reply, and by one that was cut."""
    ids: list[int] = []
    num_said = 0
    for is_reply, block in groupby(episode.messages, key=lambda message: message.role == "assistant"):
        messages = tuple(block)
        if not is_reply:
            if num_said:
                cut = ids[:-1] if ids[-1] in renderer.stop_ids else ids
                yield _Step(cut, renderer.extend(cut, messages), is_cut=True)
            extended = renderer.extend(ids, messages) if num_said else renderer.start(messages, tools)
            num_said += len(messages)
            yield _Step(ids, extended, num_said)
            ids = extended
            continue
        for number, message in enumerate(messages):
            if number:
                extended = renderer.extend(ids, ())
                yield _Step(ids, extended)
                ids = extended
            reply = renderer.encode_reply(message, tools)
            if not reply or reply[-1] not in renderer.stop_ids:
                raise PolicyError(f"{episode.task.id}: a reply does not end with a stop token")
            yield _Step(ids, [*ids, *reply])
            ids = [*ids, *reply]
        num_said += len(messages)


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
        fields: dict[str, object] = dict(tool.parameters.get("properties", {}))
        found = {name: hard_values(field, tool.parameters) for name, field in fields.items()}
        choices = {name: values for name, values in found.items() if values}
        plain = {name: values[0] for name, values in choices.items()}
        if not meets(plain, {**tool.parameters, "type": "object"}, tool.parameters):
            continue  # a schema that is not known here: no call rather than a wrong one
        yield _call(tool.name, plain)
        for name, values in choices.items():
            for value in values[1:]:
                yield _call(tool.name, {**plain, name: value})


def _call(name: str, arguments: JsonObject) -> Message:
    return Message("assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))
