"""`palaestra doctor CONFIG`: whether a training job would work, found out by trying its parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from palaestra.cli._options import interruptible, run_to_end, with_flags
from palaestra.cli._tables import ProseTable, visible
from palaestra.config import load_toml, merge
from palaestra.errors import ConfigError

if TYPE_CHECKING:
    from palaestra.trainer.doctor import Check, Subject

QUICKSTART = "quickstart"
"""The word that stands for the main job with its own settings."""

_FAILED = 2
_RUN_RECORD = "config.json"


def examine_job(config: str, assignments: Sequence[str], imports: Sequence[str], *, as_json: bool) -> None:
    """Print a row for each check of a job; exit code 2 when one fails."""
    subject = load_subject(config, assignments, imports)
    from palaestra.trainer.doctor import Verdict, examine
    from palaestra.trainer.progress import SilentDisplay, TerminalDisplay

    with interruptible("nothing is left running"):
        checks = run_to_end(examine(subject, SilentDisplay() if as_json else TerminalDisplay()))
    has_failed = any(check.verdict is Verdict.FAILURE for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": not has_failed, "checks": [check.to_json() for check in checks]}, indent=2))
    else:
        show_checks(checks)
    if has_failed:
        raise typer.Exit(_FAILED)


def load_subject(config: str, assignments: Sequence[str], imports: Sequence[str]) -> Subject:
    """The job that `config` names: a TOML file, a run folder, or `quickstart`; raises `ConfigError`."""
    is_record = Path(config).is_dir()
    values = with_flags(_read(config), assignments, imports)
    from palaestra.trainer.doctor import Subject
    from palaestra.trainer.job import Job
    from palaestra.trainer.quickstart import FOR_GIVEN_MODEL, QuickstartConfig

    if not _is_quickstart(config, values, set(QuickstartConfig.model_fields) - set(Job.model_fields)):
        return Subject.of_job(Job.parse(values, source=config), is_resolved=is_record)
    if values.get("model") is not None and not is_record:
        # what the main job sets for a given model is not what the user chose
        chosen = Subject.of_quickstart(QuickstartConfig.parse(values, source=config)).given
        return Subject.of_quickstart(
            QuickstartConfig.parse(merge(FOR_GIVEN_MODEL, values), source=config), given=chosen
        )
    return Subject.of_quickstart(QuickstartConfig.parse(values, source=config), is_resolved=is_record)


def _is_quickstart(config: str, values: dict[str, Any], own_keys: set[str]) -> bool:
    return config == QUICKSTART or ("suite" not in values and "train" not in values and bool(own_keys & set(values)))


def _read(config: str) -> dict[str, Any]:
    if config == QUICKSTART:
        return {}
    path = Path(config)
    return _read_record(path / _RUN_RECORD) if path.is_dir() else load_toml(path)


def _read_record(path: Path) -> dict[str, Any]:
    """What a run keeps of its configuration, as a job."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} is no run folder: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"cannot read {path}: it is no JSON object")
    if "model_type" in values or "architectures" in values:
        raise ConfigError(
            f'{path.parent} is a model folder, not a job: name it in a TOML file (model = "{path.parent}"), or check '
            f"the main job with it (palaestra doctor quickstart --set model={path.parent})"
        )
    if isinstance(values.get("suite"), dict):
        values["suite"].pop("rewards", None)  # a description; the suite of a job has no other reward
    return values


def show_checks(checks: Sequence[Check]) -> None:
    """A line for each check, then what helps, then how many failed."""
    table = ProseTable("check", "", "s", "what was seen")
    for check in checks:
        mark = check.verdict.value if check.verdict.value != "failure" else "FAILURE"
        table.add_row(check.name, mark, f"{check.seconds:.1f}", check.detail)
    table.show()
    for check in checks:
        if check.remedy:
            typer.echo(visible(f"{check.name}: {check.remedy}"))
    counts = {verdict: sum(check.verdict.value == verdict for check in checks) for verdict in ("failure", "warning")}
    typer.echo(", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items()))
