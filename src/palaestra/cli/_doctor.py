"""`palaestra doctor`: what this machine can and cannot isolate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from palaestra.sandboxes.doctor import Diagnosis

_CANNOT_ISOLATE = 1


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Try every sandbox back end on this machine and say what it contains; exit code 1 when none isolates."""
    from palaestra.sandboxes.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(_to_json(diagnosis), indent=2))
    else:
        _show(diagnosis)
    if not diagnosis.can_isolate:
        raise typer.Exit(_CANNOT_ISOLATE)


def _to_json(diagnosis: Diagnosis) -> dict[str, object]:
    return {
        "can_isolate": diagnosis.can_isolate,
        "machine": [
            {"part": each.part, "ok": each.is_ok, "detail": each.detail, "remedy": each.remedy}
            for each in diagnosis.machine
        ],
        "backends": {name: sorted(capabilities) for name, capabilities in diagnosis.backends.items()},
        "unavailable": diagnosis.unavailable,
    }


def _show(diagnosis: Diagnosis) -> None:
    from palaestra.sandboxes import Capability

    console = Console()
    machine = Table("machine", "", "what was seen")
    for finding in diagnosis.machine:
        detail = f"{finding.detail}; {finding.remedy}" if finding.remedy else finding.detail
        machine.add_row(finding.part, _mark(finding.is_ok), detail)
    console.print(machine)
    names = list(diagnosis.backends)
    if names:
        contains = Table("contained or offered", *names)
        for capability in Capability:
            marks = [_mark(capability in diagnosis.backends[name]) for name in names]
            contains.add_row(capability.replace("_", " "), *marks)
        console.print(contains)
    for name, reason in diagnosis.unavailable.items():
        console.print(f"no {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if not diagnosis.can_isolate:
        console.print("nothing here contains code that nobody vouches for", markup=False)


def _mark(is_ok: bool) -> str:
    return "yes" if is_ok else "NO"
