"""The run folder of the main job: which stages are done, and what each left.

Invariant: a stage is done when its record is there; the record is written last, as a whole, so a job that was
interrupted goes on at the first stage without one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palaestra.agents import EvalReport, summarise
from palaestra.errors import ConfigError
from palaestra.records import read_episodes, write_episodes, write_whole
from palaestra.trainer.report import Stage


class RunFolder:
    """Paths and stage records under one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def base(self) -> Path:
        """The model before any training."""
        return self.path / "base"

    @property
    def sft(self) -> Path:
        """The model after imitation."""
        return self.path / "sft"

    @property
    def rl(self) -> Path:
        """The run folder of the fit."""
        return self.path / "rl"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "model"

    @property
    def logs(self) -> Path:
        """What the processes print."""
        return self.path / "logs"

    def prepare(self, config: dict[str, Any]) -> None:
        """Make the folder, keep the configuration; raises `ConfigError` when it was begun with another one."""
        recorded = self.path / "config.json"
        text = json.dumps(config, indent=2) + "\n"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if recorded.is_file() and json.loads(recorded.read_text()) != json.loads(text):
                raise ConfigError(f"{self.path} was begun with other settings; choose another --run, or remove it")
            write_whole(recorded, text)
            write_whole(self.path / "seed", f"{config['seed']}\n")
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {self.path}: {error.strerror}; free space or move it"
            ) from error

    def stage(self, name: str) -> Stage | None:
        """The record of a finished stage."""
        path = self._record(name)
        return Stage(**json.loads(path.read_text())) if path.is_file() else None

    @contextmanager
    def record_stage(self, name: str) -> Iterator[StageNote]:
        """Time a stage; its record is written when the block ends without an error and says that it is done."""
        started_s = time.monotonic()
        note = StageNote()
        yield note
        if not note.is_done:
            return
        seconds = time.monotonic() - started_s if note.seconds is None else note.seconds
        values = {"name": name, "seconds": seconds, "note": note.text}
        write_whole(self._record(name), json.dumps(values) + "\n")

    def stages(self) -> list[Stage]:
        """All finished stages, in the order they ended."""
        files = sorted((self.path / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return [Stage(**json.loads(path.read_text())) for path in files]

    def keep_evaluation(self, key: str, report: EvalReport) -> None:
        """Keep an evaluation's episodes as one JSON object a line."""
        write_episodes(self._episodes(key), report.episodes)

    def load_evaluation(self, key: str, policy_name: str) -> EvalReport:
        """An evaluation kept by `keep_evaluation`."""
        return summarise(policy_name, list(read_episodes(self._episodes(key))))

    def _record(self, name: str) -> Path:
        return self.path / "stages" / f"{name.replace(' ', '-')}.json"

    def _episodes(self, key: str) -> Path:
        return self.path / "episodes" / f"test-{key}.jsonl"


class StageNote:
    """What a stage says about itself in the report; `seconds` where it is not the time in the block."""

    def __init__(self) -> None:
        self.text = ""
        self.seconds: float | None = None
        self.is_done = True
