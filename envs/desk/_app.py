"""The desk's HTTP interface: one database for each episode, told apart by bearer token.

Invariant: a request reaches only the database of its own token; without a valid token it reaches none.
Every route is `async` and so runs on the server's one thread: an SQLite statement in memory takes
microseconds, a hop to a thread pool would take longer and two threads would share a connection.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from palaestra.envs.desk._database import DeskDatabase, DeskError
from palaestra.envs.desk._words import Level, Team

router = APIRouter()


class NewEpisode(BaseModel):
    """Rows by table name."""

    tables: dict[str, list[dict[str, Any]]]


class TicketChange(BaseModel):
    """New values of a ticket's columns; what is left out stays. Refused for a ticket about something else."""

    model_config = ConfigDict(extra="forbid")

    priority: Level | None = None
    team: Team | None = None
    status: Literal["closed"] | None = None
    expected_subject: str = ""


class Settlement(BaseModel):
    """How a paid order is settled. Refused for an order of something else."""

    status: Literal["refunded", "declined"]
    expected_item: str = ""


def create_app(admin_key: str) -> FastAPI:
    """The application; `admin_key` is the bearer token that may open episodes."""
    app = FastAPI(title="Service desk", docs_url=None, redoc_url=None)
    app.state.admin_key = admin_key
    app.state.desks = {}
    app.add_exception_handler(DeskError, _refuse)
    app.include_router(router)
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, DeskError) else 500
    return JSONResponse({"detail": str(error)}, status_code=status)


def _token(request: Request) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ")


async def _find_desk(request: Request) -> DeskDatabase:
    desk: DeskDatabase | None = request.app.state.desks.get(_token(request))
    if desk is None:
        raise DeskError(401, "unknown token: the episode is over, or was never opened here")
    return desk


Desk = Annotated[DeskDatabase, Depends(_find_desk)]


@router.get("/health", response_model=None)
async def health() -> JSONResponse:
    """Whether the server answers at all."""
    return JSONResponse({"status": "ok"})


@router.post("/episodes", response_model=None)
async def open_episode(request: Request, episode: NewEpisode) -> JSONResponse:
    """Make a database and give the token to it."""
    if not secrets.compare_digest(_token(request).encode(), request.app.state.admin_key.encode()):
        raise DeskError(401, "only the administrator may open an episode")
    token = secrets.token_urlsafe(16)
    request.app.state.desks[token] = DeskDatabase(episode.tables)
    return JSONResponse({"token": token}, status_code=201)


@router.delete("/episodes/current", response_model=None)
async def close_episode(request: Request, desk: Desk) -> JSONResponse:
    """Drop the database and give its final rows."""
    tables = desk.dump()
    del request.app.state.desks[_token(request)]
    desk.close()
    return JSONResponse(tables)


@router.get("/customers", response_model=None)
async def find_customer(desk: Desk, name: str) -> JSONResponse:
    """The customer of that full name, as a list of one."""
    return JSONResponse([desk.find_customer(name)])


@router.get("/customers/{customer}/{table}", response_model=None)
async def list_of_customer(desk: Desk, customer: int, table: Literal["tickets", "orders"]) -> JSONResponse:
    """A customer's tickets or orders."""
    return JSONResponse(desk.list_of(table, customer))


@router.patch("/tickets/{ticket}", response_model=None)
async def change_ticket(desk: Desk, ticket: int, change: TicketChange) -> JSONResponse:
    """Change an open ticket."""
    desk.expect("tickets", ticket, change.expected_subject)
    for column, value in change.model_dump(exclude_none=True, exclude={"expected_subject"}).items():
        desk.change_ticket(ticket, column, value)
    return JSONResponse({"status": "ok"})


@router.post("/orders/{order}/settlement", response_model=None)
async def settle_order(desk: Desk, order: int, settlement: Settlement) -> JSONResponse:
    """Refund a paid order, or decline to."""
    desk.expect("orders", order, settlement.expected_item)
    desk.settle_order(order, settlement.status)
    return JSONResponse({"status": "ok"})
