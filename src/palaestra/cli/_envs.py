"""`palaestra envs`: what can be played."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def envs(
    name: Annotated[str | None, typer.Argument(help="Show one environment with its tools.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the registered environments, or describe one."""
    from palaestra.envs import registration, registrations

    if name is not None:
        registration(name)
        _describe(name, as_json)
        return
    rows = registrations()
    if as_json:
        keys = ("env_id", "family", "summary", "entry_point")
        typer.echo(json.dumps([{key: getattr(row, key) for key in keys} for row in rows], indent=2))
        return
    table = Table("environment", "family", "what it is")
    for row in rows:
        table.add_row(row.env_id, row.family, row.summary)
    Console().print(table)


def _describe(name: str, as_json: bool) -> None:
    from palaestra.envs import EnvSuite, registration

    env = EnvSuite({name: 1.0}).make(name)
    if as_json:
        value = {
            "env_id": name,
            "family": registration(name).family,
            "summary": registration(name).summary,
            "num_tasks": dict(env.num_tasks),
            "limits": env.limits.model_dump(),
            "tools": [tool.to_json() for tool in env.tools],
        }
        typer.echo(json.dumps(value, indent=2))
        return
    console = Console(soft_wrap=True)
    console.print(f"{name}: {registration(name).summary}", markup=False)
    console.print("tasks: " + ", ".join(f"{count} {split}" for split, count in env.num_tasks.items()), markup=False)
    console.print(f"limits: {env.limits.max_turns} turns, {env.limits.episode_s:g} s an episode", markup=False)
    for tool in env.tools:
        arguments = ", ".join(tool.parameters["properties"])
        console.print(f"  {tool.name}({arguments}): {tool.description.splitlines()[0]}", markup=False)
