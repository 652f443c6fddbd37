"""The chat client against a real HTTP server on loopback that misbehaves on demand."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from palaestra.agents._engine import Sampling
from palaestra.agents.engines.openai import ChatClient, ChatConfig
from palaestra.errors import ConfigError, ContextFullError, PolicyError
from palaestra.types import Message, ToolCall, ToolSpec
from tests.cancelling import cancel_many

Answer = Callable[[], Response]

SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_tokens=33)
HELLO = (Message("user", "hello"),)
ADD = ToolSpec(name="add", description="Add.", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})


class Endpoint:
    """Answers request i with `script[i]`, the last entry for ever; records what it was sent."""

    def __init__(self, *script: Answer) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    async def complete(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        return self.script[min(len(self.bodies), len(self.script)) - 1]()


@asynccontextmanager
async def serving(*script: Answer) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(*script)
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", endpoint.complete, methods=["POST"], response_model=None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0)
            try:
                yield endpoint
            finally:
                server.should_exit = True


def client_of(endpoint: Endpoint, **options: Any) -> ChatClient:
    config = {"base_url": endpoint.url, "model": "m", "first_wait_s": 0.001, "deadline_s": 20.0, **options}
    return ChatClient(ChatConfig.parse(config), rng=random.Random(0))


def says(**message: Any) -> Answer:
    return lambda: JSONResponse({"choices": [{"message": {"role": "assistant", **message}}]})


def fails(status: int, text: str = "busy", **headers: str) -> Answer:
    return lambda: PlainTextResponse(text, status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def calls(*functions: dict[str, Any]) -> Answer:
    entries = [{"id": f"id{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return says(content=None, tool_calls=entries)


async def test_sends_conversation_tools_and_sampling_in_openai_form() -> None:
    history = (
        Message("system", "be brief"),
        Message("user", "1+2?"),
        Message(
            "assistant", "", (ToolCall(name="add", arguments={"a": 1}, id="x"), ToolCall(name="add", malformed="{a"))
        ),
        Message("tool", "3", name="add", tool_call_id="x"),
    )
    async with serving(says(content="three")) as endpoint, client_of(endpoint) as client:
        assert await client.complete(history, [ADD], SAMPLING) == Message("assistant", "three")
    body = endpoint.bodies[0]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.5, 0.9, 33)
    assert body["tools"] == [ADD.to_json()]
    assert body["messages"][:2] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+2?"}]
    assert body["messages"][2]["tool_calls"] == [
        {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "", "type": "function", "function": {"name": "add", "arguments": "{a"}},
    ]
    assert body["messages"][3] == {"role": "tool", "content": "3", "tool_call_id": "x"}
    assert "authorization" not in endpoint.headers[0]


async def test_tool_calls_are_parsed_and_malformed_arguments_kept() -> None:
    answer = calls(
        {"name": "add", "arguments": '{"a": 1}'},
        {"name": "add", "arguments": '{"a": '},
        {"name": "add", "arguments": "[1]"},
        {"name": "stop", "arguments": ""},
        {"name": "add", "arguments": {"a": 2}},
    )
    async with serving(answer) as endpoint, client_of(endpoint) as client:
        message = await client.complete(HELLO, [], SAMPLING)
    assert "tools" not in endpoint.bodies[0]
    assert message.content == ""
    assert message.tool_calls == (
        ToolCall(name="add", arguments={"a": 1}, id="id0"),
        ToolCall(name="add", malformed='{"a": ', id="id1"),
        ToolCall(name="add", malformed="[1]", id="id2"),
        ToolCall(name="stop", id="id3"),
        ToolCall(name="add", arguments={"a": 2}, id="id4"),
    )


async def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}]
    async with serving(says(content=parts)) as endpoint, client_of(endpoint) as client:
        assert (await client.complete(HELLO, [], SAMPLING)).content == "ab"


@pytest.mark.parametrize("fault", [fails(429), fails(500), fails(503), fails(200, "<html>"), fails(200, "{}")])
async def test_passing_faults_are_retried(fault: Answer) -> None:
    async with serving(fault, fault, says(content="ok")) as endpoint, client_of(endpoint) as client:
        assert (await client.complete(HELLO, [], SAMPLING)).content == "ok"
        assert len(endpoint.bodies) == 3


async def test_gives_up_after_max_attempts_with_the_last_reason() -> None:
    async with serving(fails(503, "overloaded")) as endpoint, client_of(endpoint, max_attempts=3) as client:
        with pytest.raises(PolicyError, match="failed 3 times, at last: 503 overloaded"):
            await client.complete(HELLO, [], SAMPLING)
        assert len(endpoint.bodies) == 3


async def test_retry_after_is_obeyed_up_to_the_longest_wait() -> None:
    script = (fails(429, Retry_After="3600"), says(content="ok"))
    async with serving(*script) as endpoint, client_of(endpoint, max_wait_s=0.2) as client:
        started = asyncio.get_running_loop().time()
        await client.complete(HELLO, [], SAMPLING)
        assert 0.2 <= asyncio.get_running_loop().time() - started < 5


async def test_the_deadline_bounds_waits_and_attempts() -> None:
    async with serving(fails(429, Retry_After="30")) as endpoint, client_of(endpoint, deadline_s=0.2) as client:
        with pytest.raises(PolicyError, match=r"no answer within 0\.2 s"):
            await client.complete(HELLO, [], SAMPLING)


async def test_an_endpoint_that_does_not_listen_is_a_policy_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = Endpoint()
        endpoint.url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        async with client_of(endpoint, max_attempts=2) as client:
            with pytest.raises(PolicyError, match="failed 2 times, at last: ConnectError"):
                await client.complete(HELLO, [], SAMPLING)


async def test_refusals_are_not_retried() -> None:
    async with serving(fails(400, "no such model")) as endpoint, client_of(endpoint) as client:
        with pytest.raises(PolicyError, match="refused: 400 no such model"):
            await client.complete(HELLO, [], SAMPLING)
        assert len(endpoint.bodies) == 1


async def test_a_full_context_is_its_own_error() -> None:
    full = fails(400, '{"error": {"code": "context_length_exceeded"}}')
    async with serving(full) as endpoint, client_of(endpoint) as client:
        with pytest.raises(ContextFullError, match="context_length_exceeded"):
            await client.complete(HELLO, [], SAMPLING)


async def test_the_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALAESTRA_TEST_KEY", "not-a-secret")
    script, name = (says(content="ok"), fails(401, "bad key")), "PALAESTRA_TEST_KEY"
    async with serving(*script) as endpoint, client_of(endpoint, api_key_env=name) as client:
        await client.complete(HELLO, [], SAMPLING)
        assert endpoint.headers[0]["authorization"] == "Bearer not-a-secret"
        with pytest.raises(PolicyError, match=r"401 bad key; check the key in \$PALAESTRA_TEST_KEY"):
            await client.complete(HELLO, [], SAMPLING)


def test_a_key_variable_that_is_not_set_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="PALAESTRA_NO_SUCH_KEY"):
        ChatClient(ChatConfig(base_url="http://127.0.0.1/v1", model="m", api_key_env="PALAESTRA_NO_SUCH_KEY"))


async def test_many_conversations_at_once_share_few_connections() -> None:
    async with (
        serving(says(content="ok")) as endpoint,
        client_of(endpoint, max_connections=4) as client,
        asyncio.TaskGroup() as group,
    ):
        tasks = [group.create_task(client.complete(HELLO, [], SAMPLING)) for _ in range(40)]
    assert [task.result().content for task in tasks] == ["ok"] * 40


async def test_messages_that_are_cancelled_while_they_wait_take_no_place() -> None:
    options = {"max_connections": 4, "max_attempts": 1}
    async with serving(says(content="hi")) as endpoint, client_of(endpoint, **options) as client:
        await cancel_many(partial(client.complete, HELLO, (), SAMPLING))
        for _ in range(3):
            assert (await client.complete(HELLO, (), SAMPLING)).content == "hi"
