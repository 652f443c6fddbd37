"""The HTML page: results with intervals, what was done in each stage, plots, and example episodes."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from palaestra.agents import EvalReport, Proportion
from palaestra.trainer.report._plots import draw_plots, short_name
from palaestra.trainer.report._predicted import Comparison
from palaestra.types import Episode

_EXAMPLES_PER_ENV = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a job: how long it took in seconds, and one sentence on what it did."""

    name: str
    seconds: float
    note: str


def write_report(
    run: Path,
    *,
    title: str,
    stages: Sequence[Stage],
    evaluations: Sequence[EvalReport],
    steps: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    shown: EvalReport | None = None,
    comparison: Comparison | None = None,
) -> Path:
    """Write `report.html`, `report.json`, `steps.json` and the plots into the run folder; the page's path.

    `shown` is the evaluation whose episodes are printed as examples. What there is nothing of has no section.
    """
    plots = draw_plots(run / "plots", evaluations, steps)
    environment = Environment(
        loader=PackageLoader("palaestra.trainer.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = _percent
    env_ids = sorted({env_id for report in evaluations for env_id in report.by_env})
    page = environment.get_template("report.html").render(
        title=title,
        stages=stages,
        total_s=math.fsum(stage.seconds for stage in stages),
        evaluations=evaluations,
        env_ids=env_ids,
        short_name=short_name,
        times=loop_times(steps),
        plots={name: base64.b64encode(path.read_bytes()).decode() for name, path in plots.items()},
        shown=shown.policy if shown is not None else "",
        examples=_examples(shown.episodes) if shown is not None else [],
        facts=facts,
        notes=notes,
        comparison=comparison,
    )
    values = {
        "title": title,
        "stages": [{"name": s.name, "seconds": s.seconds, "note": s.note} for s in stages],
        "evaluations": [report.to_json() for report in evaluations],
        "loop_times": loop_times(steps),
        "predicted": comparison.to_json() if comparison is not None else None,
        "facts": dict(facts),
        "notes": list(notes),
    }
    (run / "steps.json").write_text(json.dumps(list(steps)) + "\n")
    (run / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    target = run / "report.html"
    target.write_text(page)
    return target


def loop_times(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the training loop by what it waited for, and mean use of each component, in [0, 1]."""
    if not steps:
        return {}
    wall_s = math.fsum(record["wall_s"] for record in steps)
    sums = {key: math.fsum(record[key] for record in steps) for key in ("wait_s", "learn_s", "sync_s")}
    uses = {
        key: math.fsum(record[key] * record["wall_s"] for record in steps) / max(wall_s, 1e-9)
        for key in ("use_engine", "use_learner", "use_envs")
    }
    return {"wall_s": wall_s, **sums, **uses}


def _percent(value: Proportion) -> str:
    if value.count == 0:
        return "none"
    return f"{value.rate:.1%} [{value.low:.1%}, {value.high:.1%}] of {value.count}"


def _examples(episodes: Sequence[Episode]) -> list[Episode]:
    shown: list[Episode] = []
    for env_id in sorted({episode.env_id for episode in episodes}):
        own = [episode for episode in episodes if episode.env_id == env_id]
        won = [e for e in own if e.is_success][:_EXAMPLES_PER_ENV]
        lost = [e for e in own if not e.is_success][:1]
        shown.extend(won + lost)
    return shown
