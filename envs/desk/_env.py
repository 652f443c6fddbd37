"""`ToolDesk`: fulfil a request at a service desk by changing its records through tools.

Invariant: success is read from the final database alone: the initial rows with exactly the required changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from palaestra.envs._base import Env, EnvLimits
from palaestra.envs._experts import Expert
from palaestra.envs._tools import tool
from palaestra.envs.desk._client import DeskServer, DeskSession
from palaestra.envs.desk._expert import DeskExpert
from palaestra.envs.desk._tasks import NUM_TASKS, judge, make_data
from palaestra.envs.desk._wording import POLICY, request_text, result_text
from palaestra.envs.desk._words import FIRST_NAMES, LAST_NAMES, Level, Team
from palaestra.errors import SandboxError, TaskError
from palaestra.types import JsonObject, Message, Observation, Split, Task

Number = Annotated[int, Field(ge=0, le=99)]
About = Annotated[str, Field(max_length=40, examples=[""])]
Name = Annotated[
    str,
    Field(max_length=80, examples=[f"{first} {last}" for first, last in zip(FIRST_NAMES, LAST_NAMES, strict=True)]),
]

_REQUEST_S = 10.0


class ToolDesk(Env):
    """A service desk with customers, tickets and orders; each episode has its own database on a real server."""

    env_id = "palaestra/ToolDesk-v0"
    num_tasks = NUM_TASKS
    default_limits = EnvLimits(max_turns=8)

    def __init__(self, *, server_port: int = 0, **kwargs: Any) -> None:
        """`server_port` 0 takes any free port; other arguments are those of `Env`."""
        if not 0 <= server_port < 65536:
            raise TaskError(f"server_port must be in 0 to 65535, not {server_port}")
        super().__init__(**kwargs)
        self._server_port = server_port
        self._session: DeskSession | None = None

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        """World, request and required changes; see `_tasks`."""
        return make_data(split, index)

    async def begin(self, task: Task) -> Observation:
        """Open a database with the task's rows and say the request."""
        server = await self._find_server()
        # below the tool's own limit, so that a dead server is our fault and not a slow call of the agent's
        timeout_s = min(_REQUEST_S, self.limits.tool_s / 2)
        self._session = await server.open_session(task.data["tables"], timeout_s=timeout_s)
        request = Message("user", request_text(task.data["request"], self.form))
        return (request,) if self.form == "compact" else (Message("system", POLICY), request)

    async def verify(self) -> Mapping[str, float]:
        """Compare the final database with the expected one, row by row; see `_tasks.judge`."""
        session, self._session = self._require_session(), None
        return judge(self.task.data, await session.close())

    async def end(self) -> None:
        """Delete the episode's database, unless `verify` has."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(SandboxError):  # with the server its databases are gone
                await session.close()

    def expert(self) -> Expert:
        """Solves every task of both forms."""
        return DeskExpert()

    @tool
    async def find_customer(self, name: Name) -> str:
        """Find a customer by full name; answers the customer's number."""
        return await self._look_up("customer", "/customers", query={"name": name})

    @tool
    async def list_tickets(self, customer: Number) -> str:
        """List the tickets of a customer, given by number."""
        return await self._look_up("ticket", f"/customers/{customer}/tickets")

    @tool
    async def list_orders(self, customer: Number) -> str:
        """List the orders of a customer, given by number."""
        return await self._look_up("order", f"/customers/{customer}/orders")

    # A change names what it is about beside the number, so that a mistaken number is refused.

    @tool
    async def set_priority(self, *, subject: About = "", ticket: Number, level: Level) -> str:
        """Set the priority of an open ticket; refused if the ticket's subject is not the one given."""
        return await self._change_ticket(subject, ticket, {"priority": level})

    @tool
    async def assign_ticket(self, *, subject: About = "", ticket: Number, team: Team) -> str:
        """Hand an open ticket to a team; refused if the ticket's subject is not the one given."""
        return await self._change_ticket(subject, ticket, {"team": team})

    @tool
    async def close_ticket(self, *, subject: About = "", ticket: Number) -> str:
        """Close an open ticket, which cannot be undone; refused if its subject is not the one given."""
        return await self._change_ticket(subject, ticket, {"status": "closed"})

    @tool
    async def refund_order(self, *, item: About = "", order: Number) -> str:
        """Pay a paid order back, which cannot be undone; refused if it was for another item than the one given."""
        return await self._settle(item, order, "refunded")

    @tool
    async def decline_refund(self, *, item: About = "", order: Number) -> str:
        """Decline to pay a paid order back; refused if it was for another item than the one given."""
        return await self._settle(item, order, "declined")

    @tool
    async def done(self) -> str:
        """Say that the request is fulfilled; ends the work."""
        self.finish()
        return "ok"

    async def _look_up(self, kind: str, path: str, query: dict[str, str] | None = None) -> str:
        rows = await self._require_session().request("GET", path, query=query)
        return result_text(kind, rows, self.form)

    async def _change_ticket(self, subject: str, ticket: int, change: dict[str, str]) -> str:
        body = {**change, "expected_subject": subject}
        await self._require_session().request("PATCH", f"/tickets/{ticket}", body=body)
        return "ok"

    async def _settle(self, item: str, order: int, status: str) -> str:
        body = {"status": status, "expected_item": item}
        await self._require_session().request("POST", f"/orders/{order}/settlement", body=body)
        return "ok"

    def _require_session(self) -> DeskSession:
        if self._session is None:
            raise SandboxError("the episode has no database: its begin failed, or it is over")
        return self._session

    async def _find_server(self) -> DeskServer:
        key = ("desk", self._server_port)
        server = await self.resources.get(key, self._start_server)
        if await server.is_usable():
            return server
        self.resources.forget(key, server)
        await server.aclose(grace_s=0)  # now, not at the end: with a fixed port the next server needs it free
        return await self.resources.get(key, self._start_server)

    async def _start_server(self) -> DeskServer:
        return await DeskServer.start(port=self._server_port)
