"""The nouns of the design as immutable values: messages, tasks, episodes, trajectories, groups.

Invariants: a value is never changed after it is made; all but `Trajectory` is plain data that survives
JSON; a trajectory is five equally long arrays, and only tokens that the policy sampled are in its loss mask.

Shape legend: `T` tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

JsonObject: TypeAlias = Mapping[str, Any]
"""A JSON object; its values are what `json.loads` can return."""

Split = Literal["train", "validation", "test"]
Form = Literal["compact", "full"]
"""How an environment words its tasks: for a small model made from scratch, or for a large one."""

Role = Literal["system", "user", "assistant", "tool"]


class Outcome(StrEnum):
    """How an episode ended. Only `SCORED` (and `TRUNCATED`, if configured) episodes get an advantage."""

    SCORED = "scored"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    INFRA_ERROR = "infra_error"
    UNSCORABLE = "unscorable"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call that the agent asks for. A call that did not parse keeps its text in `malformed`."""

    name: str
    arguments: JsonObject = field(default_factory=dict)
    id: str = ""
    malformed: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `tool_calls` belongs to the assistant role, `name` and `tool_call_id` to the tool role."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """The message as a plain JSON object; empty fields are left out."""
        return {key: value for key, value in asdict(self).items() if value or key == "content"}

    @staticmethod
    def from_json(value: JsonObject) -> Message:
        """Inverse of `to_json`."""
        calls = tuple(ToolCall(**call) for call in value.get("tool_calls", ()))
        return Message(**{**value, "tool_calls": calls})


Observation: TypeAlias = tuple[Message, ...]
"""What an environment says: the messages that are new since the agent's last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What the agent is told about a tool. `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: JsonObject

    def to_json(self) -> dict[str, Any]:
        """The OpenAI function-tool form, which chat templates and endpoints take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem instance. `id` is unique over all environments and splits; `data` is JSON."""

    id: str
    env_id: str
    split: Split
    seed: int
    data: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """The value of one reward term on one episode, and what it added to the total."""

    name: str
    value: float
    weight: float
    contribution: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One assistant message and what the environment answered; times in seconds."""

    action: Message
    observation: Observation
    num_calls: int = 0
    num_invalid_calls: int = 0
    policy_s: float = 0.0
    env_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why an episode has no score: the error's class, its one-line message and where it crossed."""

    kind: str
    message: str
    boundary: Literal["env", "policy", "reward", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What reward terms read: the finished conversation and the facts that the environment verified.

    `facts` are numbers measured by the environment itself (hidden tests, page reward, database state);
    `facts["success"]` in [0, 1] is always there. The agent has no way to write them.
    """

    task: Task
    turns: tuple[Turn, ...]
    facts: Mapping[str, float]
    outcome: Outcome
    max_turns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """An episode as tokens, in five arrays of shape (T,).

    `ids` int32; `loss_mask` bool, true where the policy sampled the token; `logprobs` float32, the
    behaviour log-probability in nats, 0 outside the mask; `versions` int32, the policy version that
    sampled the token, -1 outside the mask; `turns` int16, the turn index, -1 before the first turn.
    """

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    turns: NDArray[np.int16]

    def __post_init__(self) -> None:
        lengths = {len(array) for array in (self.ids, self.loss_mask, self.logprobs, self.versions, self.turns)}
        if len(lengths) != 1:
            raise ValueError(f"trajectory arrays differ in length: {sorted(lengths)}")
        if bool(np.any(self.versions[self.loss_mask] < 0)):
            raise ValueError("a sampled token has no policy version")

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # arrays have none

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy sampled."""
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int:
        """Version of the oldest sampled token; raises `ValueError` when nothing was sampled."""
        return int(self.versions[self.loss_mask].min())


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One agent on one task, first message to outcome.

    `reward` and `terms` are set exactly when `outcome` is scored or truncated; a failure of ours carries
    `failure` and no number. `trajectory` is None for policies without tokens (scripted, remote).
    """

    id: str
    task: Task
    outcome: Outcome
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    reward: float | None
    terms: tuple[RewardTerm, ...]
    facts: Mapping[str, float]
    trajectory: Trajectory | None
    failure: Failure | None
    wall_s: float
    timings: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbered = self.outcome in (Outcome.SCORED, Outcome.TRUNCATED)
        if numbered != (self.reward is not None):
            raise ValueError(f"episode {self.id}: outcome {self.outcome} with reward {self.reward}")

    @property
    def is_success(self) -> bool:
        """True when the environment's own check was fully met."""
        return self.outcome is Outcome.SCORED and self.facts.get("success", 0.0) >= 1.0

    @property
    def env_id(self) -> str:
        """The environment that the task belongs to."""
        return self.task.env_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """G episodes of one task: the unit of a group-relative advantage."""

    id: str
    task: Task
    episodes: tuple[Episode, ...]

    @property
    def oldest_version(self) -> int | None:
        """Oldest policy version of any token that can be trained: sampled, in an episode with a reward. Else None."""
        scored = [e.trajectory for e in self.episodes if e.reward is not None and e.trajectory is not None]
        return min((t.oldest_version for t in scored if t.num_sampled), default=None)
