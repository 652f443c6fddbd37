"""`palaestra size CONFIG.toml`: measure a minute, predict the step, propose settings."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palaestra.cli._tables import PlainTable, visible
from palaestra.errors import PalaestraError

if TYPE_CHECKING:
    from palaestra.trainer.job import Job
    from palaestra.trainer.sizing import Measurements, Prediction, Proposal


def size(
    config: Annotated[Path, typer.Argument(help="TOML file of a training job, as `palaestra train` takes it.")],
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to measure, after the parts have started.")] = 60.0,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override one key: --set train.steps=10.", metavar="KEY=VALUE")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder that keeps the prediction; by default the job's, if it names one.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write the proposed job to this new TOML file.")] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module of yours to import first; repeatable.", metavar="MODULE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a training job's parts and propose concurrency, micro-batch, split and mode, with the step's time."""
    from palaestra.cli._options import interruptible, load_job, run_to_end

    with interruptible("nothing was kept"):
        job = load_job(config, assignments or (), imports or ())
        folder = run or job.run
        _check_places(write, folder)
        from palaestra.trainer.progress import SilentDisplay, TerminalDisplay
        from palaestra.trainer.sizing import measure, propose, proposed_job, write_size

        display = SilentDisplay() if as_json else TerminalDisplay()
        with _logs() as logs:
            measured = run_to_end(measure(job, seconds=seconds, logs=logs, display=display))
    proposal = propose(measured, job.train)
    proposed = proposed_job(job, proposal)
    kept = write_size(folder, job, proposed, measured, proposal) if folder is not None else None
    if write is not None:
        _write(write, proposed)
    if as_json:
        typer.echo(json.dumps(_to_json(measured, proposal), indent=2))
    else:
        _show(measured, proposal)
        for path, what in ((kept, "the prediction, for the report of this run"), (write, "the proposed job")):
            if path is not None:
                typer.echo(f"{what}: {path}")
        if kept is None:
            typer.echo(
                "no run folder is named, so no report will compare the prediction: give the one to be with --run"
            )


@contextmanager
def _logs() -> Iterator[Path]:
    """Where the parts log: in a temporary folder, which stays only where an error names it."""
    folder = Path(tempfile.mkdtemp(prefix="palaestra-size-"))
    is_named = False
    try:
        yield folder
    except PalaestraError as error:
        is_named = str(folder) in str(error)
        raise
    finally:
        if not is_named:
            shutil.rmtree(folder)


def _check_places(write: Path | None, run: Path | None) -> None:
    """Refuse now what could not be written after a minute of measurement."""
    from palaestra.errors import ConfigError

    if write is not None and write.exists():
        raise ConfigError(f"{write} exists already: name a new file with --write")
    for path, flag in ((write, "--write"), (run and run / "size.json", "--run")):
        if path is not None and not _can_be_made(path):
            raise ConfigError(f"{path} cannot be written: choose another place with {flag}")


def _can_be_made(path: Path) -> bool:
    """Whether the nearest folder that is there takes new entries."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _write(path: Path, job: Job) -> None:
    from palaestra.errors import ConfigError
    from palaestra.records import write_whole
    from palaestra.trainer.sizing import chosen_values, to_toml

    try:
        write_whole(path, to_toml(chosen_values(job)))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _to_json(measured: Measurements, proposal: Proposal) -> dict[str, Any]:
    modes = {
        mode: {"concurrency": setting.concurrency, "predicted": prediction.to_json()}
        for mode, (setting, prediction) in proposal.by_mode.items()
    }
    return {
        "settings": [change.to_json() for change in proposal.changes],
        "proposed": proposal.assignments,
        "predicted": {"now": proposal.now.to_json(), "proposed": proposal.proposed.to_json(), "by_mode": modes},
        "notes": list(proposal.notes),
        "measured": measured.to_json(),
    }


def _show(measured: Measurements, proposal: Proposal) -> None:
    _show_measurements(measured)
    settings = PlainTable("setting", "now", "proposed", "why")
    for change in proposal.changes:
        same = change.proposed == change.now
        settings.add_row(change.key, str(change.now), "same" if same else str(change.proposed), change.why)
    settings.show()
    steps = PlainTable("predicted seconds", "step", "waiting for rollouts", "learning", "weight sync", "ideal")
    rows: list[tuple[str, Prediction]] = [("now", proposal.now), ("proposed", proposal.proposed)]
    rows += [(f"best {mode}", prediction) for mode, (_, prediction) in sorted(proposal.by_mode.items())]
    for name, step in rows:
        times = (step.step_s, step.wait_s, step.learn_s, step.sync_s, step.ideal_s)
        steps.add_row(name, *(f"{value:.2f}" for value in times))
    steps.show()
    for note in proposal.notes:
        typer.echo(visible(f"note: {note}"))
    _show_lines(proposal)


def _show_measurements(measured: Measurements) -> None:
    typer.echo(
        f"episodes of the {measured.player}: {len(measured.episodes)}, with {measured.turns_per_episode:.1f} turns of "
        f"{measured.tokens_per_turn:.0f} tokens and {measured.env_s_per_turn * 1000:.0f} ms in the environment"
    )
    engine = PlainTable("requests at once", "tokens per second", "ms per token of each")
    for level in measured.engine:
        engine.add_row(str(level.concurrency), f"{level.tokens_per_s:.0f}", f"{level.token_s * 1000:.2f}")
    engine.show()
    learner = PlainTable("micro-batch tokens", "learner's tokens per second")
    for row in measured.learner:
        learner.add_row(str(row.tokens), f"{1 / row.token_s:.0f}")
    learner.show()
    names = ("engine", "learner", "driver", "environments", "others")
    cores = PlainTable(f"cores in use, of {measured.num_cores}", *names)
    for phase, used in measured.cores.items():
        cores.add_row(phase, *(f"{used.get(name, 0.0):.2f}" for name in names))
    cores.show()
    typer.echo(
        f"together, the engine is {measured.engine_slowdown:.2f} and the learner {measured.learner_slowdown:.2f} times "
        f"slower than alone; rollouts take {measured.overhead:.2f} times what the model of them says; "
        f"an update costs {measured.learner_update_s:.3f} s beside its tokens, weight sync "
        f"{measured.sync_s:.2f} s, during rollouts {measured.busy_sync_s:.2f} s"
    )


def _show_lines(proposal: Proposal) -> None:
    """The settings that change, ready to paste."""
    from palaestra.config import override
    from palaestra.trainer.sizing import to_toml

    if not proposal.assignments:
        typer.echo("nothing to change")
        return
    typer.echo("to paste:\n")
    typer.echo(to_toml(override({}, proposal.assignments)))
