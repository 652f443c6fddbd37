"""A model as the main job would make it, from what the experts said: random weights, in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from palaestra.trainer.demonstrations import Demonstration, texts_of
from palaestra.trainer.doctor._env_worker import Played
from palaestra.trainer.doctor._subject import NewModel
from palaestra.trainer.tiny import make_model, make_tokenizer


def make_new_model(new: NewModel, played: Mapping[str, Played], folder: Path) -> Path:
    """Write tokenizer and weights to `folder`; blocks for the seconds in which torch loads."""
    demonstrations = [
        Demonstration(task_id=e.task.id, messages=e.messages, tools=each.tools, is_success=e.is_success)
        for each in played.values()
        for e in each.episodes
    ]
    make_tokenizer(texts_of(demonstrations), folder, vocab_size=new.vocab_size)
    return make_model(folder, new.size, seed=new.seed)
