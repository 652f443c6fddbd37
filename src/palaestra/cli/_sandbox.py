"""`palaestra sandbox list | reap | bench | serve`: what runs, what was left, how fast it is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from palaestra.cli._tables import PlainTable, visible

app = typer.Typer(name="sandbox", no_args_is_help=True, help="Sandboxes on this machine: list, reap, bench, serve.")
_FAILED, _MENDABLE = 1, 2
_BENCHED = ("jail", "docker", "podman")


@app.command("list")
def list_sandboxes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show every leased sandbox and browser of this user, and whether its owner is alive."""
    from palaestra.sandboxes.leases import boot_s, list_leases

    now_s = boot_s()
    leases = list_leases()
    if as_json:
        rows = [
            {**asdict(lease), "is_orphan": lease.is_orphan, "left_s": round(lease.left_s(now_s), 1)} for lease in leases
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = PlainTable("sandbox", "back end", "owner", "run", "age", "left", has_box=False)
    for lease in leases:
        owner = f"{lease.owner_pid}, gone" if lease.is_orphan else str(lease.owner_pid)
        age, left = _span(now_s - lease.began_s), _span(lease.left_s(now_s))
        table.add_row(lease.id, lease.backend, owner, lease.label, age, left)
    table.show()
    num_orphans = sum(lease.is_orphan for lease in leases)
    if num_orphans:
        typer.echo(f"{num_orphans} without an owner: `palaestra sandbox reap` clears them")


@app.command("reap")
def reap_sandboxes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Clear what killed runs left, and what has outlived its lease; what a living owner uses stays."""
    from palaestra.sandboxes.leases import reap

    cleared = reap()
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in cleared], indent=2))
    else:
        for each in cleared:
            outcome = f"NOT cleared: {each.error}" if each.error else "cleared"
            typer.echo(visible(f"{each.what}: {each.why}; {outcome}"))
        if not cleared:
            typer.echo("nothing to clear")
    if any(each.error for each in cleared):
        raise typer.Exit(_FAILED)


@app.command("bench")
def bench(
    backend: Annotated[
        list[str] | None, typer.Option("--backend", help="Back end; repeatable. All that run here by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Measurements of each figure; medians are shown.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure latency and throughput of sandboxes on this machine, at concurrency 1, 4 and 16."""
    from palaestra.cli._options import interruptible, run_to_end
    from palaestra.sandboxes.bench import allow_open_files, measure

    allow_open_files()
    figures = []
    with interruptible("nothing was kept"):
        for name in backend or _usable(_BENCHED):
            figures += run_to_end(measure(name, repeats=repeats))
    if as_json:
        typer.echo(json.dumps([asdict(figure) for figure in figures], indent=2))
    if not figures:
        raise typer.Exit(_MENDABLE)
    if as_json:
        return
    table = PlainTable("back end", "what", "concurrency", "median", "90 %", "a second")
    for figure in figures:
        latency = (f"{figure.median_ms:.1f} ms", f"{figure.p90_ms:.1f} ms")
        table.add_row(figure.backend, figure.what, str(figure.concurrency), *latency, f"{figure.per_s:.1f}")
    table.show()


def _usable(names: tuple[str, ...]) -> list[str]:
    """The back ends that run here; why the others do not is told on the error stream."""
    from palaestra.sandboxes import check_backend

    reasons = {name: check_backend(name) for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"palaestra: no {name}: {reason}", file=sys.stderr, flush=True)
    return [name for name, reason in reasons.items() if reason is None]


@app.command("serve")
def serve_sandboxes(
    backend: Annotated[str, typer.Option(help="Back end to offer.")] = "jail",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8766,
    lease_s: Annotated[float, typer.Option(help="Boxes of a client that was silent for so long end.")] = 60.0,
) -> None:
    """Offer this machine's sandboxes over HTTP to clients which show PALAESTRA_SANDBOX_TOKEN, until told to stop."""
    from palaestra.sandboxes.server import serve

    serve(host, port, backend, lease_s=lease_s, on_ready=lambda url: typer.echo(f"sandboxes at {url}"))


def _span(seconds: float) -> str:
    if seconds < 0:
        return "over"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"
