"""A policy behind an OpenAI-compatible endpoint: for evaluation, since it gives no tokens to train on."""

from __future__ import annotations

import os
from types import TracebackType

from palaestra.agents._engine import Sampling
from palaestra.agents.engines.openai import ChatClient, ChatConfig
from palaestra.envs import Env
from palaestra.errors import PolicyError
from palaestra.types import Message, Observation, Task

KEY_VARIABLE = "OPENAI_API_KEY"


class ChatPolicy:
    """Plays through `base_url`; the key, where one is needed, comes from the variable `OPENAI_API_KEY`."""

    def __init__(
        self, base_url: str, model: str, *, sampling: Sampling | None = None, config: ChatConfig | None = None
    ) -> None:
        key_variable = KEY_VARIABLE if KEY_VARIABLE in os.environ else ""
        self.name = model
        self._config = config or ChatConfig(base_url=base_url, model=model, api_key_env=key_variable)
        self._sampling = sampling or Sampling()
        self._client: ChatClient | None = None

    def session(self, env: Env, task: Task, *, seed: int) -> _ChatSession:
        """A session; endpoints promise no determinism, so the seed is not used."""
        if self._client is None:
            raise PolicyError("enter the policy first: `async with policy:`")
        return _ChatSession(self._client, self._sampling, env)

    async def __aenter__(self) -> ChatPolicy:
        self._client = ChatClient(self._config)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


class _ChatSession:
    def __init__(self, client: ChatClient, sampling: Sampling, env: Env) -> None:
        self._client = client
        self._sampling = sampling
        self._tools = env.tools
        self._conversation: list[Message] = []

    async def act(self, observation: Observation) -> Message:
        self._conversation.extend(observation)
        message = await self._client.complete(self._conversation, self._tools, self._sampling)
        self._conversation.append(message)
        return message

    def trajectory(self) -> None:
        return None
