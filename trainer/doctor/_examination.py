"""The examination: what depends on what, and in which order.

Environments are probed, and groups of the model played, in processes of their own; engine and learner start meanwhile.
A model that the job makes itself is made from the experts' first episodes. Invariants: every check gives one row, in
one order, whatever breaks; when `examine` returns or raises, no process and no folder of it is left.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from palaestra.resources import Resources
from palaestra.trainer.doctor import _environment_checks, _model_checks
from palaestra.trainer.doctor._check import Check, Finding, warning
from palaestra.trainer.doctor._environment_checks import EnvironmentChecks, at_once
from palaestra.trainer.doctor._guard import Part, Sheet
from palaestra.trainer.doctor._machine import Machine, look_at_machine
from palaestra.trainer.doctor._marks import marked
from palaestra.trainer.doctor._memory_plan import judge_memory, plan
from palaestra.trainer.doctor._model_checks import ModelChecks
from palaestra.trainer.doctor._model_size import UnknownSizeError, read_size
from palaestra.trainer.doctor._probe import EnvProbe
from palaestra.trainer.doctor._rules import check_settings
from palaestra.trainer.doctor._subject import NewModel, Subject
from palaestra.trainer.progress import Display

_QUICK_S = 30.0


async def examine(subject: Subject, display: Display) -> list[Check]:
    """Check a job before it runs; a row for each check."""
    names = _row_names(subject)
    with tempfile.TemporaryDirectory(prefix="palaestra-doctor-") as folder, display.bar("doctor", len(names)) as bar:
        sheet = Sheet(bar)
        async with marked(folder), Resources() as resources:
            await _fill(subject, sheet, Path(folder), resources)
        return [sheet.rows[name] for name in names]


def _row_names(subject: Subject) -> list[str]:
    of_environments = [f"{what} {env_id}" for env_id in subject.suite.env_ids for what in _environment_checks.ROWS]
    return ["settings", *of_environments, _environment_checks.ROW_OF_ALL, *_model_checks.ROWS, "memory"]


async def _fill(subject: Subject, sheet: Sheet, folder: Path, resources: Resources) -> None:
    machine = await asyncio.to_thread(look_at_machine)  # before anything of ours takes memory
    probe = await _open_probe(subject, folder, "environments", resources)
    player = await _open_probe(subject, folder, "groups", resources)
    environments = EnvironmentChecks(subject, sheet, probe)
    model = ModelChecks(subject, sheet, folder, resources, environments.conversations, player)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(environments.run())
        tasks.create_task(model.run())
        # what a model reads is known when it is there; the rules are not asked about one that is not
        is_there = isinstance(subject.model, NewModel) or await model.model.get_or_none() is not None
        known = replace(subject, is_there=is_there)
        tasks.create_task(sheet.row("settings", _QUICK_S, partial(_check_settings, known, machine)))
    measure = partial(_check_memory, subject, machine, model, environments.memory_mb)
    await sheet.row("memory", _QUICK_S, measure)


async def _open_probe(subject: Subject, folder: Path, name: str, resources: Resources) -> EnvProbe:
    probe = EnvProbe(subject.suite, folder, concurrency=at_once(subject), seed=subject.train.seed, name=name)

    async def given() -> EnvProbe:
        return probe

    return await resources.get(name, given)


async def _check_settings(subject: Subject, machine: Machine) -> Finding:
    return await asyncio.to_thread(check_settings, subject, machine)


async def _check_memory(subject: Subject, machine: Machine, model: ModelChecks, memory_mb: Part[int]) -> Finding:
    machine = await asyncio.to_thread(machine.with_disk_of, subject.run)
    path, environments_mb = await model.model.get(), await memory_mb.get_or_none()
    try:
        size = await asyncio.to_thread(read_size, path)  # last of all: a hub model has been fetched by now
    except UnknownSizeError as error:
        return warning(f"size not known: {error}", "reckon with 16 bytes for each parameter, beside the engine's")
    return judge_memory(plan(size, subject.train, machine, await model.rows(), environments_mb), machine)
