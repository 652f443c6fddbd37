"""Records: what is read back is what was written."""

from __future__ import annotations

import json
from pathlib import Path

from palaestra.agents import ExpertPolicy, evaluate
from palaestra.envs import EnvSuite
from palaestra.records import episode_from_json, episode_to_json, read_episodes, write_episodes
from palaestra.types import Episode
from tests.toys import register_echo

register_echo()


def play() -> tuple[Episode, ...]:
    suite = EnvSuite({"test/Echo-v0": 1.0}, active_split="test")
    return evaluate(ExpertPolicy(skill=0.5), suite, tasks=6).episodes


def test_episode_survives_json() -> None:
    for episode in play():
        assert episode_from_json(json.loads(json.dumps(episode_to_json(episode))), None) == episode


def test_episodes_survive_a_file(tmp_path: Path) -> None:
    episodes = play()
    write_episodes(tmp_path / "new" / "episodes.jsonl", episodes)
    assert tuple(read_episodes(tmp_path / "new" / "episodes.jsonl")) == episodes
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["episodes.jsonl"]
