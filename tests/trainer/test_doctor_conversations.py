"""Conversations as tokens: renderers that rewrite history or lose arguments are found, ours are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from palaestra.agents import ExpertPolicy, Renderer
from palaestra.agents.renderers import open_renderer
from palaestra.envs import EnvLimits, EnvSuite
from palaestra.resources import Resources
from palaestra.trainer.doctor import Verdict
from palaestra.trainer.doctor._check import Finding
from palaestra.trainer.doctor._conversations import check_calls, hard_calls, judge_template, transcribe
from palaestra.trainer.doctor._env_worker import Played
from palaestra.trainer.doctor._hard_values import hard_values
from palaestra.trainer.tiny import make_tokenizer
from palaestra.types import Episode, Message, ToolSpec
from tests.agents.renderers.conftest import qwen_folder as qwen_folder
from tests.toys import WORDS, call, register_echo

register_echo()
ECHO = "test/Echo-v0"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    texts = ["say said stop ok wrong", *WORDS] * 3
    return open_renderer(make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=512))


@pytest.fixture
async def played() -> dict[str, Played]:
    from palaestra.agents import run_episode

    suite = EnvSuite({ECHO: 1.0})
    async with Resources() as resources:
        episodes = [
            await run_episode(suite.make(ECHO, resources=resources), ExpertPolicy(), task, episode_id=task.id, seed=0)
            for task in suite.tasks(3)
        ]
    return {ECHO: Played(tuple(episodes), suite.make(ECHO).tools, EnvLimits(), {}, 1.0)}


class Changed:
    """A renderer with one fault."""

    def __init__(self, inner: Renderer, fault: str) -> None:
        self._inner = inner
        self._fault = fault
        self._num_started = 0
        self.num_blind = 0
        self.stop_ids = () if fault == "stop" else inner.stop_ids

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        self._num_started += 1
        match self._fault:
            case "counts":  # as a template does that tells the number of messages
                return [len(messages), *self._inner.start(messages, tools)]
            case "clock":  # or one that tells the time
                return [self._num_started, *self._inner.start(messages, tools)]
            case "trims":  # or one that leaves out what was thought in earlier turns
                kept = [replace(m, content="") if m.role == "assistant" else m for m in messages]
                return self._inner.start(kept, tools)
        return self._inner.start(messages, tools)

    def extend(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        extended = self._inner.extend(ids, messages)
        self.num_blind += self._fault == "blind"
        return extended[1:] if self._fault == "history" else extended

    def parse(self, ids: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        parsed = self._inner.parse(ids, tools)
        is_lost = self._fault == "words" or (self._fault == "quotes" and '"' in str(parsed.tool_calls))
        return call("say", word="lost") if is_lost and parsed.tool_calls else parsed

    def encode_reply(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        return self._inner.encode_reply(message, tools)


def check_template(played: Mapping[str, Played], renderer: Renderer, max_model_len: int) -> Finding:
    return judge_template(transcribe(played, renderer), renderer, max_model_len)


def test_our_format_appends_and_comes_back(played: dict[str, Played], renderer: Renderer) -> None:
    finding = check_template(played, renderer, 512)
    assert finding.verdict is Verdict.OK
    assert "of 512 tokens" in finding.detail
    assert "3 conversations are the same rendered at once" in finding.detail
    finding = check_calls(played, renderer)
    assert finding.verdict is Verdict.OK, finding.detail


def test_format_that_rewrites_history_fails(played: dict[str, Played], renderer: Renderer) -> None:
    finding = check_template(played, Changed(renderer, "history"), 512)
    assert finding.verdict is Verdict.FAILURE
    assert "does not start with the tokens before it" in finding.detail


def test_format_without_a_stop_token_fails(played: dict[str, Played], renderer: Renderer) -> None:
    assert check_template(played, Changed(renderer, "stop"), 512).verdict is Verdict.FAILURE


@pytest.mark.parametrize(("fault", "where"), [("counts", "token 0 of"), ("clock", "token 0 of"), ("trims", "token ")])
def test_format_that_renders_other_tokens_at_once_is_a_warning(
    played: dict[str, Played], renderer: Renderer, fault: str, where: str
) -> None:
    finding = check_template(aloud(played), Changed(renderer, fault), 512)
    assert finding.verdict is Verdict.WARNING
    assert "3 of 3 conversations of several turns are other tokens when rendered at once" in finding.detail
    assert where in finding.detail
    assert check_template(aloud(played), renderer, 512).verdict is Verdict.OK


def aloud(played: dict[str, Played]) -> dict[str, Played]:
    """The same conversations, with words before each call."""

    def speak(episode: Episode) -> Episode:
        said = (replace(m, content="bee") if m.role == "assistant" else m for m in episode.messages)
        return replace(episode, messages=tuple(said))

    return {name: each._replace(episodes=tuple(map(speak, each.episodes))) for name, each in played.items()}


def test_published_format_that_strips_thoughts_is_told(qwen_folder: Path, played: dict[str, Played]) -> None:
    thinking = open_renderer(qwen_folder, family="qwen3", is_thinking=True)
    finding = check_template(played, thinking, 4096)
    assert finding.verdict is Verdict.WARNING
    assert "3 of 3 conversations of several turns are other tokens" in finding.detail
    plain = check_template(played, open_renderer(qwen_folder, family="qwen3"), 4096)
    assert plain.verdict is Verdict.OK, plain.detail


def test_blind_extensions_are_counted(played: dict[str, Played], renderer: Renderer) -> None:
    finding = check_template(played, Changed(renderer, "blind"), 512)
    assert finding.verdict is Verdict.WARNING
    assert "12 of 21 extensions are blind" in finding.detail


def test_template_that_nothing_was_rendered_with_proves_nothing(renderer: Renderer) -> None:
    assert check_template({}, renderer, 512).verdict is Verdict.SKIPPED


def test_expert_that_hardly_fits_is_a_warning(played: dict[str, Played], renderer: Renderer) -> None:
    finding = check_template(played, renderer, 20)
    assert finding.verdict is Verdict.WARNING
    assert "max_model_len" in finding.remedy


def test_changed_messages_of_experts_fail_and_awkward_ones_warn(played: dict[str, Played], renderer: Renderer) -> None:
    finding = check_calls(played, Changed(renderer, "words"))
    assert finding.verdict is Verdict.FAILURE
    assert '"lost"' in finding.detail
    finding = check_calls(played, Changed(renderer, "quotes"))
    assert finding.verdict is Verdict.WARNING
    assert "awkward arguments come back changed" in finding.detail


def test_hard_values_meet_their_schema() -> None:
    schema = {"$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}}}}
    assert hard_values({"type": "integer", "minimum": 1, "maximum": 9}, schema) == [7]
    assert hard_values({"type": "integer", "minimum": 20, "maximum": 30}, schema) == [20]
    assert hard_values({"enum": ["a", "b"]}, schema) == ["a", "b"]
    assert hard_values({"type": "boolean"}, schema) == [True, False]
    assert all(set(point) == {"x"} for point in hard_values({"$ref": "#/$defs/Point"}, schema))
    assert None in hard_values({"anyOf": [{"type": "string"}, {"type": "null"}]}, schema)
    assert [] in hard_values({"type": "array", "items": {"type": "string"}}, schema)
    assert all(len(text) <= 4 for text in hard_values({"type": "string", "maxLength": 4}, schema))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ({"type": ["boolean", "null"]}, [True, False, None]),
        ({"oneOf": [{"type": "boolean"}, {"type": "null"}]}, [True, False, None]),
        ({"oneOf": [{"type": "integer", "minimum": 8}, {"type": "number", "minimum": 8}]}, []),
        ({"allOf": [{"type": "integer"}, {"maximum": -5}]}, [-5]),
        ({"type": "integer", "exclusiveMinimum": 5, "exclusiveMaximum": 7}, [6]),
        ({"type": "number", "exclusiveMinimum": 5}, [6]),
        ({"type": "integer", "multipleOf": 6, "minimum": 1, "maximum": 9}, [6]),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, []),
        ({"type": "string", "pattern": "^[0-9]+$"}, ["007"]),
        ({"type": "string", "pattern": "^[q]{3}$"}, []),
        ({"type": "string", "pattern": "("}, []),
        ({"type": "string", "minLength": 60}, ["x" * 60]),
        ({"type": "string", "format": "date"}, []),
        ({"type": "array", "maxItems": 1, "items": {"type": "boolean"}}, [[True], []]),
        ({"type": "array", "minItems": 3, "items": {"type": "boolean"}}, [[True, False, True]]),
        ({"type": "array", "minItems": 3, "items": {"type": "boolean"}, "uniqueItems": True}, []),
        ({"type": "object", "additionalProperties": False}, [{}]),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, [{"key": True}, {}, {"a b": False}]),
        ({"type": "object", "properties": {"x": {"format": "date"}}, "required": ["x"]}, []),
        ({"enum": []}, []),
        ({"$ref": "#/$defs/Gone"}, []),
        ({"type": 3}, []),
        (False, []),
    ],
)
def test_hard_values_respect_bounds_and_are_none_where_a_schema_cannot_be_served(
    field: object, values: list[object]
) -> None:
    assert hard_values(field, {}) == values


def test_any_value_meets_a_schema_that_asks_for_nothing() -> None:
    assert hard_values(True, {}) == hard_values({}, {}) == hard_values({"type": "string"}, {})


def test_tool_that_cannot_be_called_well_is_not_called() -> None:
    fields = {"day": {"type": "string", "format": "date"}, "text": {"type": "string"}}
    parameters = {"type": "object", "properties": fields, "required": ["day"]}
    assert list(hard_calls([ToolSpec(name="note", description="", parameters=parameters)])) == []
    optional = ToolSpec(name="note", description="", parameters={**parameters, "required": []})
    assert {tuple(message.tool_calls[0].arguments) for message in hard_calls([optional])} == {("text",)}


def test_a_schema_that_contains_itself_ends() -> None:
    tree = {"type": "object", "properties": {"child": {"$ref": "#/$defs/Tree"}}}
    assert hard_values({"$ref": "#/$defs/Tree"}, {"$defs": {"Tree": tree}})


def test_each_awkward_call_varies_one_argument() -> None:
    fields = {"text": {"type": "string"}, "count": {"type": "integer"}}
    spec = ToolSpec(name="note", description="", parameters={"type": "object", "properties": fields})
    calls = [message.tool_calls[0].arguments for message in hard_calls([spec])]
    assert calls[0] == {"text": "plain", "count": 0}
    assert all(set(arguments) == {"text", "count"} for arguments in calls)
    assert sum(arguments["text"] != "plain" and arguments["count"] != 0 for arguments in calls) == 0
    assert any("🦊" in str(arguments["text"]) for arguments in calls)


def test_nested_arguments_come_back(tmp_path: Path) -> None:
    renderer = open_renderer(make_tokenizer(["a b"], tmp_path, vocab_size=400))
    fields = {"filters": {"type": "object"}, "ids": {"type": "array", "items": {"type": "number"}}}
    spec = ToolSpec(name="find", description="", parameters={"type": "object", "properties": fields})
    nothing = Played((), (spec,), EnvLimits(), {}, 1.0)
    finding = check_calls({"t": nothing}, renderer)
    assert finding.verdict is Verdict.OK, finding.detail
