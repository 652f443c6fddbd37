"""What this machine offers a run: cores, memory, GPUs. Nothing heavy is imported to find out."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from palaestra.errors import ConfigError
from palaestra.sandboxes.doctor import free_memory
from palaestra.trainer.sync import publish_place

_QUERY = ("nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits")
_QUERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Sizes in MiB. `gpu_free_mb` and `gpu_total_mb` are of the first GPU, 0 without one that torch can use.

    Weights are published below `publish_place`; shared memory has a size of its own, 64 MB in most containers.
    """

    num_cores: int
    free_mb: int
    free_what: str = "available"
    gpu_free_mb: int = 0
    gpu_total_mb: int = 0
    publish_place: str = "/dev/shm"
    publish_free_mb: int = 1 << 20
    disk_place: str = "the run's disk"
    disk_free_mb: int = 1 << 20

    @property
    def publishes_to_memory(self) -> bool:
        """Whether published weights take the host's memory, not a disk's."""
        return self.publish_place == "/dev/shm"

    def uses_gpu(self, device: str) -> bool:
        """Whether a part with this `device` setting computes on a GPU here."""
        return device != "cpu" and self.gpu_total_mb > 0

    def with_disk_of(self, run: Path | None) -> Machine:
        """With the disk of the run's folder, by default of this one; raises `ConfigError` where none can be there."""
        try:
            folder = next(path for path in ((run or Path()).absolute() / "_").parents if path.is_dir())
            free_mb = shutil.disk_usage(folder).free >> 20
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"the run's folder cannot be {str(run)[:80]}: {why}; choose another one") from error
        return replace(self, disk_place=f"the disk of {folder}", disk_free_mb=free_mb)


def look_at_machine() -> Machine:
    """What is there now; blocks for a moment."""
    free_mb, what = free_memory()
    place = publish_place()
    gpu_free_mb, gpu_total_mb = _gpu() if _torch_has_cuda() else (0, 0)
    return Machine(
        num_cores=len(os.sched_getaffinity(0)),
        free_mb=free_mb,
        free_what=what,
        gpu_free_mb=gpu_free_mb,
        gpu_total_mb=gpu_total_mb,
        publish_place=str(place),
        publish_free_mb=shutil.disk_usage(place).free >> 20,
    )


def _torch_has_cuda() -> bool:
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False


def _gpu() -> tuple[int, int]:
    try:
        asked = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_S, check=True)
        free, total = asked.stdout.splitlines()[0].split(",")
        return int(free), int(total)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0, 0
