"""The Docker daemon killed in the middle of a run, and there again later. It is one of the test's own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.conftest import require
from tests.faults.jobs import Job, check_plays, check_whole, last_step, plays

REPAIR = "palaestra/CodeRepair-v0"
_START_S = 30.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Daemon:
    """A dockerd with a socket, a storage and a network of its own: without a bridge it removes the machine's."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/docker.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str | None:
        """Start it; why it does not serve, or None."""
        places = [f"--{name}={self._folder / name}" for name in ("data-root", "exec-root", "pidfile")]
        # the killed daemon's, whose number a zombie may still have where nobody reaps
        for stale in ("pidfile", "exec-root/containerd/containerd.pid"):
            (self._folder / stale).unlink(missing_ok=True)
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                ["unshare", "--net", "dockerd", "-H", self.url, *places, "--bridge=none", "--iptables=false"],
                stdout=log,
                stderr=log,
            )
        deadline_s = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            if self.ask("version").returncode == 0:
                return None
            time.sleep(0.1)
        return (self._folder / "log").read_text()[-300:]

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["docker", "-H", self.url, *arguments], capture_output=True, text=True, check=False)

    def kill(self) -> None:
        """Kill it and all that it started, as with the machine's memory full: containers and their keepers too."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):
                if str(self._folder) in " ".join(process.cmdline()):
                    process.kill()

    def remove(self) -> None:
        """End it for good."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=60)
        for mount in psutil.disk_partitions(all=True):
            if mount.mountpoint.startswith(str(self._folder)):
                subprocess.run(["umount", "--lazy", mount.mountpoint], check=False)
        shutil.rmtree(self._folder)


@contextmanager
def running_daemon() -> Iterator[Daemon]:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))  # short: the daemon's sockets lie below it
    daemon = Daemon(folder)
    try:
        has_one = shutil.which("dockerd") and shutil.which("docker")
        require("docker", daemon.start() if has_one else "there is no dockerd")
        yield daemon
    finally:
        daemon.remove()


def last_outcome_is(run: Path, *outcomes: str) -> bool:
    return last_step(run) > 0 and plays(run)[-1]["outcome"] in outcomes


def test_a_killed_daemon_fails_episodes_and_the_run_goes_on_with_the_next(job: Job) -> None:
    with running_daemon() as daemon:
        job = replace(
            job,
            suite={REPAIR: 1.0},
            options={REPAIR: {"sandbox": "docker"}},
            train={"engine_config.max_model_len": 2048, "max_failure_rate": 1.0, "max_invalid_rate": 1.0},
            environment={"DOCKER_HOST": daemon.url},
        )
        with job.start(steps=100_000) as running:
            running.until_step(1)
            daemon.kill()
            running.until(partial(last_outcome_is, job.run, "infra_error"), "a failure")
            assert daemon.start() is None
            running.until(partial(last_outcome_is, job.run, "scored", "truncated"), "an episode that is played again")
            running.until_step(last_step(job.run) + 1)
            running.send(signal.SIGINT)
            ended = running.wait()
        left = daemon.ask("ps", "--all", "--quiet", "--filter", "label=palaestra.owner").stdout
    assert ended.code == 130, ended.text
    assert left == ""
    assert set(check_plays(job.run)) <= {"infra_error", "scored", "truncated"}
    check_whole(job.run, steps=last_step(job.run))
