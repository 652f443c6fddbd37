"""`palaestra sandbox serve`: boxes of this machine for clients on others."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.", min=0, max=65535)] = 8766,
    backend: Annotated[str, typer.Option(help="Sandbox back end of this machine.")] = "jail",
    lease_s: Annotated[float, typer.Option(help="Boxes of a client that was silent for so long end.")] = 60.0,
) -> None:
    """Hold sandboxes for clients, which show PALAESTRA_SANDBOX_TOKEN, until it is told to stop."""
    from palaestra.sandboxes import server

    server.serve(host, port, backend, lease_s=lease_s, on_ready=lambda url: typer.echo(f"sandboxes at {url}"))
