"""A chat client for any OpenAI-compatible endpoint: messages and tools in, one assistant message out.

Not an `Engine`: such an endpoint gives no token ids to train on, so it is for evaluation. Invariants: every
`complete` ends by its deadline; what the model got wrong (arguments that are not JSON) is kept in the
message, what the endpoint got wrong is retried or raised.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import httpx
from pydantic import Field

from palaestra.agents._engine import Sampling
from palaestra.config import Config
from palaestra.errors import ConfigError, ContextFullError, PolicyError
from palaestra.types import Message, ToolCall, ToolSpec

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_CONTEXT_FULL = ("context_length_exceeded", "maximum context length", "maximum model length")


class ChatConfig(Config):
    """Which endpoint and model, and how patient to be."""

    base_url: str
    """Up to and without `/chat/completions`, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """The model's name at the endpoint."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; empty sends none."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the limit of the answer."""
    attempt_timeout_s: float = Field(default=120.0, gt=0)
    """Deadline of one HTTP exchange."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Deadline of one message, all attempts and waits included."""
    max_attempts: int = Field(default=6, ge=1)
    """Attempts per message; 408, 409, 425, 429, 5xx and broken connections are tried again."""
    first_wait_s: float = Field(default=0.5, ge=0)
    """Wait before the second attempt; doubles each time. A `Retry-After` that is longer wins."""
    max_wait_s: float = Field(default=30.0, ge=0)
    """Longest wait between two attempts, also of a `Retry-After`."""
    max_connections: int = Field(default=64, ge=1)
    """Most exchanges at the same time."""


class ChatClient:
    """Completes conversations through one endpoint; safe for many concurrent calls on one loop."""

    def __init__(self, config: ChatConfig, *, rng: random.Random | None = None) -> None:
        """Raises `ConfigError` when the key's environment variable is not set."""
        self.config = config
        self._rng = rng or random.Random()
        self._url = config.base_url.rstrip("/") + "/chat/completions"
        self._http = httpx.AsyncClient(
            headers=_authorization(config.api_key_env),
            timeout=httpx.Timeout(config.attempt_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.max_connections),
        )
        # not the library's limit: what is cancelled while it waits there can take a place of its pool for good
        # (https://github.com/encode/httpcore/issues/1093)
        self._turns = asyncio.Semaphore(config.max_connections)

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        """The assistant's next message; a tool call whose arguments are no JSON object is kept as malformed.

        Raises `ContextFullError` when the endpoint says that the conversation is too long, `PolicyError`
        when it refuses, stays unavailable for `max_attempts`, or misses `deadline_s`.
        """
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [_to_wire(message) for message in messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.config.max_tokens_field: sampling.max_tokens,
        }
        if tools:
            body["tools"] = [tool.to_json() for tool in tools]
        try:
            async with asyncio.timeout(self.config.deadline_s):
                return await self._complete(body)
        except TimeoutError as error:
            raise PolicyError(f"{self._url} gave no answer within {self.config.deadline_s:g} s") from error

    async def aclose(self) -> None:
        """Close all connections; idempotent."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _complete(self, body: Mapping[str, Any]) -> Message:
        for attempt in range(1, self.config.max_attempts + 1):
            try:
                return await self._attempt(body)
            except _Unavailable as error:
                if attempt == self.config.max_attempts:
                    raise PolicyError(f"{self._url} failed {attempt} times, at last: {error}") from error
                wait_s = self._wait_s(attempt, error.retry_after_s)
            await asyncio.sleep(wait_s)
        raise AssertionError("max_attempts is at least 1")

    async def _attempt(self, body: Mapping[str, Any]) -> Message:
        try:
            async with self._turns, asyncio.timeout(self.config.attempt_timeout_s):
                response = await self._http.post(self._url, json=body)
        except (httpx.TransportError, TimeoutError) as error:
            raise _Unavailable(f"{type(error).__name__}: {error}") from error
        if response.status_code in _RETRIED:
            raise _Unavailable(_explain(response), retry_after_s=_retry_after_s(response))
        if not response.is_success:
            self._refuse(response)
        try:
            return _from_wire(response.json()["choices"][0]["message"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Unavailable(f"answer is no chat completion: {response.text[:200]!r}") from error

    def _refuse(self, response: httpx.Response) -> NoReturn:
        explanation = _explain(response)
        if any(sign in explanation for sign in _CONTEXT_FULL):
            raise ContextFullError(f"{self._url}: {explanation}")
        hint = ""
        if response.status_code in (401, 403):
            name = self.config.api_key_env
            hint = f"; check the key in ${name}" if name else "; set api_key_env to the variable that holds the key"
        raise PolicyError(f"{self._url} refused: {explanation}{hint}")

    def _wait_s(self, attempt: int, asked_s: float) -> float:
        # drawn from the upper half, so that calls refused together do not come back together
        backoff_s = self.config.first_wait_s * 2.0 ** (attempt - 1) * self._rng.uniform(0.5, 1.0)
        return min(max(backoff_s, asked_s), self.config.max_wait_s)


class _Unavailable(Exception):
    """The endpoint failed in a way that may pass."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def _authorization(name: str) -> dict[str, str]:
    if not name:
        return {}
    if not os.environ.get(name):
        raise ConfigError(f"api_key_env names {name}, which is not set in the environment")
    return {"Authorization": f"Bearer {os.environ[name]}"}


def _explain(response: httpx.Response) -> str:
    return f"{response.status_code} {' '.join(response.text[:500].split())}"


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0  # the date form; the backoff is good enough


def _to_wire(message: Message) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [_call_to_wire(call) for call in message.tool_calls]
    if message.role == "tool":
        wire["tool_call_id"] = message.tool_call_id
    elif message.name:
        wire["name"] = message.name
    return wire


def _call_to_wire(call: ToolCall) -> dict[str, Any]:
    arguments = call.malformed or json.dumps(dict(call.arguments))
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _from_wire(wire: Mapping[str, Any]) -> Message:
    content = wire.get("content") or ""
    if not isinstance(content, str):  # the list-of-parts form
        content = "".join(part.get("text", "") for part in content)
    calls = [_call_from_wire(call, index) for index, call in enumerate(wire.get("tool_calls") or ())]
    return Message("assistant", content, tuple(calls))


def _call_from_wire(wire: Mapping[str, Any], index: int) -> ToolCall:
    name, text = str(wire["function"]["name"]), wire["function"].get("arguments") or "{}"
    identity = str(wire.get("id") or f"call_{index}")
    try:
        arguments = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return ToolCall(name=name, id=identity, malformed=text if isinstance(text, str) else json.dumps(text))
    return ToolCall(name=name, arguments=arguments, id=identity)
