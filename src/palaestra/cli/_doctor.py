"""`palaestra doctor`: what this machine can and cannot isolate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from palaestra.cli._tables import PlainTable, visible

if TYPE_CHECKING:
    from palaestra.sandboxes.doctor import Diagnosis

_CANNOT_ISOLATE = 2


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Try every sandbox back end on this machine and say what it contains; exit code 2 when none isolates."""
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
        "remedies": {name: {what: how for what, how in _remedies(diagnosis, name)} for name in diagnosis.backends},
        "unavailable": diagnosis.unavailable,
    }


def _remedies(diagnosis: Diagnosis, name: str) -> list[tuple[str, str]]:
    """What a back end lacks, each with what helps."""
    from palaestra.sandboxes import Capability
    from palaestra.sandboxes.doctor import remedy_for

    missing = [capability for capability in Capability if capability not in diagnosis.backends[name]]
    return [(str(capability), remedy_for(name, capability, diagnosis.backends)) for capability in missing]


def _show(diagnosis: Diagnosis) -> None:
    from palaestra.sandboxes import Capability

    machine = PlainTable("machine", "", "what was seen")
    for finding in diagnosis.machine:
        detail = f"{finding.detail}; {finding.remedy}" if finding.remedy else finding.detail
        machine.add_row(finding.part, _mark(finding.is_ok), detail)
    machine.show()
    names = list(diagnosis.backends)
    if names:
        contains = PlainTable("contained or offered", *names)
        for capability in Capability:
            marks = [_mark(capability in diagnosis.backends[name]) for name in names]
            contains.add_row(capability.replace("_", " "), *marks)
        contains.show()
        for name in names:
            for what, how in _remedies(diagnosis, name):
                typer.echo(f"{name}, no {what.replace('_', ' ')}: {how}")
    for name, reason in diagnosis.unavailable.items():
        typer.echo(visible(f"no {name}: {reason}"))
    if not diagnosis.can_isolate:
        typer.echo("nothing here contains code that nobody vouches for")


def _mark(is_ok: bool) -> str:
    return "yes" if is_ok else "NO"
