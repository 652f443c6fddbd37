"""The environments that come with Palaestra."""

from __future__ import annotations

from palaestra.envs._registry import register


def register_all() -> None:
    """Register every environment of ours; idempotent."""
    register(
        "palaestra/CodeRepair-v0",
        "palaestra.envs.code:CodeRepair",
        family="code",
        summary="repair a broken Python function until its hidden tests pass in a sandbox",
    )
    register(
        "palaestra/MiniWoB-v0",
        "palaestra.envs.browser:MiniWoB",
        family="browser",
        summary="MiniWoB++ pages in Chromium, seen as an accessibility tree",
    )
    register(
        "palaestra/ToolDesk-v0",
        "palaestra.envs.desk:ToolDesk",
        family="tools",
        summary="a service desk with a SQLite database behind an HTTP server",
    )
