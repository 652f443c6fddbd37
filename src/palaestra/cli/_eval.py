"""`palaestra eval POLICY`: success with intervals, for a scripted policy, a model or an endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from palaestra.types import Form, Split

_NOTHING_ANSWERED = 1

if TYPE_CHECKING:
    from palaestra.agents import EvalReport, Policy, Sampling


def evaluate(
    policy: Annotated[str, typer.Argument(help="`expert`, `random`, a model folder, or with --endpoint a model name.")],
    env: Annotated[list[str], typer.Option("--env", help="Environment id, or id=weight; repeat for a suite.")],
    split: Annotated[Split, typer.Option(help="train, validation or test.")] = "test",
    form: Annotated[Form, typer.Option(help="How tasks are worded: compact or full.")] = "full",
    tasks: Annotated[int, typer.Option(min=1, help="Tasks, spread evenly over the environments.")] = 30,
    samples: Annotated[int, typer.Option(min=1, help="Episodes of each task, for pass@k.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one message.")] = 512,
    max_model_len: Annotated[
        int, typer.Option(min=2, help="Most tokens of a conversation, in a model's engine.")
    ] = 4096,
    family: Annotated[
        str | None, typer.Option(help="Chat family of a model whose folder does not tell, such as qwen3.")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    endpoint: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible server.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Episodes at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep the episodes here, one JSON object a line.")] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="Module of yours to import first; repeatable.", metavar="MODULE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a policy on held-out tasks."""
    from palaestra.agents import Sampling, aevaluate
    from palaestra.cli._options import import_modules, interruptible, parse_weights, run_to_end
    from palaestra.envs import EnvSuite
    from palaestra.records import write_episodes
    from palaestra.trainer.progress import SilentDisplay, TerminalDisplay

    import_modules(imports or ())
    suite = EnvSuite(parse_weights(env), form=form, active_split=split)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
    player = _open(
        policy, endpoint=endpoint, engine=engine, sampling=sampling, max_model_len=max_model_len, family=family
    )
    display = SilentDisplay() if as_json else TerminalDisplay()
    with interruptible("nothing was kept"), display.bar(f"evaluating {player.name}", tasks * samples) as bar:
        playing = aevaluate(
            player,
            suite,
            tasks=tasks,
            samples=samples,
            concurrency=concurrency,
            seed=seed,
            on_episode=lambda episode: bar.advance(),
        )
        report = run_to_end(playing)
    if out is not None:
        write_episodes(out, report.episodes)
    _show(report, as_json)
    if report.success.count == 0:
        raise typer.Exit(_NOTHING_ANSWERED)


def _open(
    name: str, *, endpoint: str | None, engine: str, sampling: Sampling, max_model_len: int, family: str | None
) -> Policy:
    from palaestra.agents import ChatPolicy, ExpertPolicy, ModelPolicy, RandomPolicy
    from palaestra.agents.engines import EngineConfig

    if endpoint is not None:
        return ChatPolicy(endpoint, name, sampling=sampling)
    if name == "expert":
        return ExpertPolicy()
    if name == "random":
        return RandomPolicy()
    engine_config = EngineConfig(max_model_len=max_model_len)
    return ModelPolicy(name, family=family, engine=engine, sampling=sampling, engine_config=engine_config)


def _show(report: EvalReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
        return
    console = Console()
    if report.num_failed:
        line = f"{report.num_failed} episodes failed on our side and count in no rate; most often: "
        console.print(line + str(report.commonest_failure), markup=False, highlight=False, soft_wrap=True)
    if report.success.count == 0:
        return
    table = Table("environment", "success", "95 % interval", "episodes")
    for env_id, value in [*report.by_env.items(), ("suite", report.success)]:
        table.add_row(env_id, f"{value.rate:.1%}", f"{value.low:.1%} to {value.high:.1%}", str(value.count))
    console.print(table)
    pass_at = ", ".join(f"pass@{k} {value:.1%}" for k, value in report.pass_at.items())
    outcomes = ", ".join(f"{count} {name}" for name, count in report.outcomes.items())
    console.print(
        f"mean reward {report.mean_reward:.3f}; {pass_at}; outcomes: {outcomes}", markup=False, highlight=False
    )
