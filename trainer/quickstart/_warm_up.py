"""The warm-up of the main job: demonstrations, a model from nothing, and imitation with a gate."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from palaestra.agents.renderers import family_of, mark_family, open_renderer
from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError
from palaestra.resources import Resources
from palaestra.trainer.demonstrations import Demonstration, collect, texts_of, tokenize
from palaestra.trainer.progress import Bar, Display
from palaestra.trainer.quickstart._config import QuickstartConfig
from palaestra.trainer.quickstart._folder import RunFolder
from palaestra.trainer.sft import SFTConfig, SFTResult, run_sft
from palaestra.trainer.tiny import make_model, make_tokenizer

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is imitated, and clean play on other tasks that tells when imitation has learned enough."""

    demonstrations: list[Demonstration]
    probe: list[Demonstration]
    skill: float

    def describe(self) -> str:
        """One sentence for the report."""
        num_solved = sum(demonstration.is_success for demonstration in self.demonstrations)
        return (
            f"{len(self.demonstrations)} episodes of experts with skill {self.skill:g}, which solved "
            f"{num_solved / len(self.demonstrations):.1%}; {len(self.probe)} clean ones for the probe"
        )


async def gather_corpus(config: QuickstartConfig, suite: EnvSuite, resources: Resources, display: Display) -> Corpus:
    """Let the scripted experts play: sloppily on training tasks, cleanly on validation tasks."""
    count = config.num_demonstrations
    with display.bar("demonstrations", count + config.num_probe) as bar:
        demonstrations = await collect(
            suite,
            count,
            skill=config.skill,
            seed=config.seed,
            concurrency=config.concurrency,
            start=demonstration_start(config, suite),
            resources=resources,
            on_episode=lambda episode: bar.advance(),
        )
        probe = await collect(
            suite,
            config.num_probe,
            skill=1.0,
            seed=config.seed,
            concurrency=config.concurrency,
            split="validation",
            resources=resources,
            on_episode=lambda episode: bar.advance(),
        )
    return Corpus(demonstrations=demonstrations, probe=probe, skill=config.skill)


def demonstration_start(config: QuickstartConfig, suite: EnvSuite) -> int:
    """First task index of the demonstrations: another stretch of the train split for each seed, around its end."""
    per_env = -(-config.num_demonstrations // len(config.weights))
    num_starts = min(suite.make(env_id).num_tasks["train"] for env_id in suite.env_ids) - per_env + 1
    return config.seed * per_env % max(1, num_starts)


def make_base(config: QuickstartConfig, folder: RunFolder, corpus: Corpus) -> str:
    """Make the small model, or note the given one, which `check_parts` put there; one sentence for the report."""
    if config.model is not None:
        return f"the given model {config.model}"
    texts = [*texts_of(corpus.demonstrations), *texts_of(corpus.probe)]
    make_tokenizer(texts, folder.base, vocab_size=config.vocab_size)
    make_model(folder.base, config.tiny, seed=config.seed)
    size = (folder.base / "model.safetensors").stat().st_size // 4
    return f"a model of {size / 1e6:.2f} million random weights and a tokenizer made from the demonstrations"


def link_model(model: str, target: Path, family: str | None = None) -> None:
    """Copy a model folder to `target`, from a local folder or from the hub's cache; `ConfigError` if neither.

    The copy says its chat family, where that is given or known.
    """
    source = Path(model).expanduser()
    if not source.is_dir():
        source = _download(model)
    if not (source / "config.json").is_file():
        raise ConfigError(f"{source} is no Hugging Face model folder: it has no config.json")
    shutil.copytree(source, target, dirs_exist_ok=True)
    mark_family(target, family_of(source, family))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model))
    except Exception as error:  # the hub's client raises many kinds; each means that the model is not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"model {model!r} is no folder here and cannot be fetched: {reason}") from error


async def imitate(config: QuickstartConfig, folder: RunFolder, corpus: Corpus, display: Display) -> str:
    """Train the base model on the demonstrations until the probe is passed; one sentence for the report."""
    renderer = open_renderer(folder.base)
    with display.bar("imitation", config.sft.max_steps) as bar:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(_watch(folder.sft / "sft.jsonl", bar))
            result = await run_sft(
                folder.base,
                folder.sft,
                tokenize(corpus.demonstrations, renderer),
                tokenize(corpus.probe, renderer),
                config.seeded_sft,
                log_path=folder.logs / "sft.log",
            )
            watcher.cancel()
    return describe_imitation(result, config.sft)


def describe_imitation(result: SFTResult, config: SFTConfig) -> str:
    """Whether the gate was passed, and after how much, in one sentence."""
    accuracy = result.probes[-1].accuracy
    state = "passed" if result.has_learned else f"NOT passed, stopped by {result.reason}"
    return (
        f"{result.steps} steps in {result.seconds:.0f} s; the probe (greedy replies on clean held-out play, whole "
        f"messages right) reached {accuracy:.1%} of the {config.probe_target:.0%} asked for: gate {state}"
    )


async def _watch(path: Path, bar: Bar) -> None:
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        lines = await asyncio.to_thread(_read_lines, path)
        if lines:
            last = json.loads(lines[-1])
            loss = f"loss {last['loss']:.3f}" if last.get("loss") is not None else ""
            bar.move_to(last["step"], loss)


def _read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
