"""What a learner writes on a disk that fills up half-way: told as such, with nothing half left and nothing lost."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from palaestra.errors import FULL, ConfigError
from palaestra.trainer._learner_files import _full_disk_named, read_state, write_model, write_state, write_weights
from palaestra.trainer.checkpoints import Checkpoints
from tests.conftest import require
from tests.toys import ToyLearner

_DISK_KB, _STATE_KB = 512, 300
"""Room for one and a half."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_KB}k", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require("mount", done.stderr.strip() or None)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def make_state(version: int) -> dict[str, Any]:
    """A state of which the weights are nearly all."""
    weights = torch.full((_STATE_KB * 256,), float(version))
    rest = {"num_updates": version, "moments": {}, "rng": torch.get_rng_state()}
    return {"version": version, "parameters": {"weight": weights}, **rest}


class Writer(ToyLearner):
    """Saves as the learner does."""

    async def save(self, folder: Path) -> None:
        write_state(make_state(self.version), folder)


async def test_a_checkpoint_that_finds_half_its_room_is_a_full_disk_and_the_one_before_stays(disk: Path) -> None:
    checkpoints, learner = Checkpoints(disk / "checkpoints"), Writer()
    learner.version = 1
    first = await checkpoints.save(learner)
    learner.version = 2
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device") as caught:
            await checkpoints.save(learner)
        assert caught.value.errno == errno.ENOSPC
        assert list((disk / "checkpoints").iterdir()) == [first]
    assert checkpoints.find(2) == first
    assert read_state(first, torch.device("cpu"))["parameters"]["weight"][0] == 1.0


class Network:
    """Weights that fill more than the disk."""

    config = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros(2 * _DISK_KB * 256)}


@pytest.mark.parametrize("write", [write_weights, lambda network, place: write_model(network, place, place)])
def test_weights_that_find_no_room_are_a_full_disk(disk: Path, write: Callable[[Any, Path], object]) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(Network(), disk / "model")
    assert caught.value.errno == errno.ENOSPC
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("number", FULL)
def test_a_share_that_is_full_is_told_where_it_is_only_a_cause(tmp_path: Path, number: int) -> None:
    def write() -> None:
        try:
            raise OSError(number, "as the system says it")
        except OSError:
            raise RuntimeError("unexpected pos 768 vs 662")  # noqa: B904  # as torch does

    with pytest.raises(OSError, match=str(tmp_path)) as caught, _full_disk_named(tmp_path):
        write()
    assert caught.value.errno == number


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"), _full_disk_named(tmp_path):
        raise RuntimeError("unexpected pos 768 vs 662")


@pytest.mark.parametrize("state", [[], {"version": 1}])
def test_a_checkpoint_that_holds_something_else_is_damaged(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "learner.pt")
    with pytest.raises(ConfigError, match="is damaged: it does not hold what a learner saves"):
        read_state(tmp_path, torch.device("cpu"))
