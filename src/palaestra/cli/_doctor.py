"""`palaestra doctor`: what this machine can and cannot isolate, or whether a training job would work."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from palaestra.cli._tables import PlainTable, ProseTable, visible
from palaestra.errors import ConfigError

if TYPE_CHECKING:
    from palaestra.sandboxes.doctor import Diagnosis

_CANNOT_ISOLATE = 2


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(help="TOML file or run folder of a training job, or `quickstart`; without it, the machine."),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: --set train.steps=10.", metavar="KEY=VALUE")
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module of yours to import first; repeatable.", metavar="MODULE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try what this machine can isolate, or the parts of a training job before it runs; exit code 2 for a failure."""
    if config is not None:
        from palaestra.cli._doctor_job import examine_job

        examine_job(config, assignments or (), imports or (), as_json=as_json)
        return
    if assignments or imports:
        raise ConfigError("--set and --import belong to a training job: palaestra doctor CONFIG")
    _diagnose_machine(as_json)


def _diagnose_machine(as_json: bool) -> None:
    """Every sandbox back end on this machine, and what it contains; exit code 2 when none isolates."""
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

    machine = ProseTable("machine", "", "what was seen")
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
