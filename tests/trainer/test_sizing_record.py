"""What `size` keeps and writes: predictions with their conditions, TOML that reads back."""

from __future__ import annotations

import json
import math
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palaestra.errors import ConfigError
from palaestra.trainer._proc import available_mb, cpu_seconds, descendants, machine_seconds, memory_mb
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.job import Job
from palaestra.trainer.sizing import (
    chosen_values,
    conditions_of,
    propose,
    proposed_job,
    read_size,
    to_toml,
    write_size,
)
from palaestra.trainer.sizing._measured import LearnerLevel
from palaestra.trainer.sizing._record import SIZE_FILE
from tests.toys import register_echo
from tests.trainer.test_sizing_model import episode, level, measurements

register_echo()


def job(**train: object) -> Job:
    return Job.parse({"model": "some/hub-name", "suite": {"weights": {"test/Echo-v0": 1.0}}, "train": train})


def test_predictions_are_kept_with_their_settings(tmp_path: Path) -> None:
    now, proposed = job(concurrency=8), job(concurrency=4)
    proposal = propose(measurements(), now.train)
    path = write_size(tmp_path / "new" / "run", now, proposed, measurements(), proposal)
    assert path.name == SIZE_FILE
    kept = read_size(path.parent)
    assert kept is not None
    assert [each.name for each in kept] == ["now", "proposed"]
    assert kept[0].predicted == proposal.now
    assert kept[1].predicted == proposal.proposed
    for each, settings in zip(kept, (now, proposed), strict=True):
        assert each.conditions == conditions_of("some/hub-name", settings.suite.build().describe(), settings.train)
    assert kept[0].conditions != kept[1].conditions
    assert json.loads(path.read_text())["measured"]["tokens_per_turn"] == 10


def test_settings_that_move_cores_are_kept_without_a_prediction(tmp_path: Path) -> None:
    now, proposed = (job(engine_config={"threads": n}, learner={"threads": n}) for n in (4, 1))
    measured = measurements(num_cores=2)
    write_size(tmp_path, now, proposed, measured, propose(measured, now.train))
    kept = read_size(tmp_path)
    assert kept is not None
    assert [each.name for each in kept] == ["now"], "the speeds were measured with other threads"


def test_a_folder_without_a_prediction_has_none(tmp_path: Path) -> None:
    assert read_size(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", '{"predictions": [{"name": "now"}]}', "[]"])
def test_a_damaged_prediction_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / SIZE_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"size\.json cannot be read"):
        read_size(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another place with --run"):
        write_size(tmp_path / "file", job(), job(), measurements(), propose(measurements(), job().train))


def test_a_job_written_as_toml_is_the_same_job() -> None:
    values: dict[str, Any] = {
        "model": 'C:\\odd "name"\x7f\n',
        "suite": {"weights": {"test/Echo-v0": 1.5}, "options": {"test/Echo-v0": {"fault": "", "tags": [1, "a"]}}},
        "train": {"mode": "sync", "learner": {"learning_rate": 1e-7}, "drop_zero_variance": True},
    }
    written = Job.parse(values).model_dump(mode="json", exclude_unset=True)
    assert Job.parse(tomllib.loads(to_toml(written))) == Job.parse(values)


def test_what_follows_from_the_rest_is_not_written_as_if_it_were_chosen() -> None:
    values = {"mode": "sync", "step_timeout_s": 100.0, "group_size": 8, "groups_per_step": 4, "concurrency": 8}
    before = job(**values)
    even = measurements(sync_s=0.0, busy_sync_s=0.0, engine=(level(1, 100.0), level(4, 200.0)))
    lengths = (episode(1, 10), episode(1, 10), episode(1, 10), episode(16, 160))
    wide, quick = (level(1, 100.0), level(32, 3200.0)), (LearnerLevel(tokens=400, token_s=1e-5),)
    uneven = replace(even, episodes=lengths, engine=wide, learner=quick)
    for proposed, measured in (("one-step", even), ("async", uneven)):
        after = proposed_job(before, propose(measured, before.train))
        assert (after.train.mode, after.train.max_lag) == (proposed, 1)
        written = chosen_values(after)["train"]
        assert not {"max_lag", "group_timeout_s"} & written.keys()
        for mode in ("sync", "one-step", "async"):
            GRPOConfig.parse(written | {"mode": mode})
    chosen = job(**{**values, "mode": "async", "max_lag": 2})
    crowded = measurements(engine_slowdown=4.0, learner_slowdown=4.0)
    again = proposed_job(chosen, propose(crowded, chosen.train))
    assert (again.train.mode, again.train.max_lag) == ("sync", 0), "a chosen lag goes with the mode"


keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
leaves = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
tables = st.recursive(
    st.dictionaries(keys, st.one_of(leaves, st.lists(leaves, max_size=3)), max_size=3),
    lambda inner: st.dictionaries(keys, st.one_of(leaves, inner, st.lists(inner, max_size=2)), max_size=3),
    max_leaves=8,
)


@given(tables)
def test_any_table_reads_back(values: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(values)) == values
    assert math.isinf(tomllib.loads(to_toml({"x": math.inf}))["x"])


def test_this_process_is_seen_in_proc() -> None:
    own = os.getpid()
    assert 0 < cpu_seconds(own) <= machine_seconds()
    now_mb = memory_mb(own)
    assert memory_mb(own, is_peak=True) >= now_mb > 1
    assert available_mb() > 1
    assert own in descendants(os.getppid())
    assert own not in descendants(os.getppid(), without=(own,))


def test_a_process_that_is_gone_counts_as_nothing() -> None:
    nobody = 2**22 + 1  # above the largest number that Linux gives
    assert cpu_seconds(nobody) == 0
    assert memory_mb(nobody) == 0
    assert descendants(nobody) == set()
