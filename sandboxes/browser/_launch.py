"""Which Chromium to start, with which flags, and in which cage.

Covers: no network (an empty network namespace, and flags that hold without one), no host file outside
/usr and the fonts, no process outlives its parent, memory of all processes together where the caller has a
cgroup. Does not cover: escapes from the renderer through the kernel: inside the cage Chromium's own sandbox is off.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from palaestra.errors import ConfigError

_log = logging.getLogger(__name__)

Isolation = Literal["bwrap", "flags"]
"""`bwrap`: own namespaces, empty network. `flags`: Chromium's flags and the request filter alone."""

_CANDIDATES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_NOBODY = "65534"
_PROBE_TIMEOUT_S = 10.0

FLAGS = (
    # The cage is the sandbox; Chromium's own needs privileges that the cage takes away.
    "--no-sandbox",
    "--no-zygote",
    # Nothing to draw: nobody looks at the pixels.
    "--disable-gpu",
    "--disable-software-rasterizer",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    # Roles and names as Chromium's accessibility engine computes them, readable from the page.
    "--enable-blink-features=ComputedAccessibilityInfo",
    # Without a network namespace these hold: measured, no leak in fourteen ways tried.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
)


HEADLESS_SHELL_FLAGS = (
    # Frames are drawn on request, and nobody requests any: a third less CPU time for a step.
    "--enable-begin-frame-control",
    "--run-all-compositor-stages-before-draw",
)


@dataclass(frozen=True, slots=True)
class Launcher:
    """A start script for Playwright's `executable_path`, and the file in which it leaves its process id."""

    script: Path
    pid_file: Path
    isolation: Isolation

    def read_pid(self) -> int:
        """Process id of the browser's outermost process."""
        return int(self.pid_file.read_text())


def flags_for(chromium: Path, heap_mb: int = 32) -> tuple[str, ...]:
    """Command-line flags for this Chromium, with a limit for each page's JavaScript heap."""
    # Small young generations: a used tab stays near 100 MB instead of 160, at no cost in time.
    heap = f"--js-flags=--max-old-space-size={heap_mb} --max-semi-space-size=1"
    extra = HEADLESS_SHELL_FLAGS if "headless-shell" in chromium.name else ()
    return (*FLAGS, heap, *extra)


def find_chromium(environ: Mapping[str, str] = os.environ) -> Path:
    """The Chromium to use; `PALAESTRA_CHROMIUM` overrides. Raises `ConfigError` when there is none."""
    named = environ.get("PALAESTRA_CHROMIUM")
    if named:
        if not os.access(named, os.X_OK):
            raise ConfigError(f"PALAESTRA_CHROMIUM={named} is not an executable file")
        return _binary(Path(named))
    for name in _CANDIDATES:
        found = shutil.which(name, path=environ.get("PATH"))
        if found:
            return _binary(Path(found))
    raise ConfigError("no Chromium found: run `apt-get install chromium`, or set PALAESTRA_CHROMIUM")


def _binary(command: Path) -> Path:
    # Debian's start script sources files of /etc, which the cage does not have; the binary needs none of them.
    binary = Path("/usr/lib/chromium") / command.name
    is_script = command.parent == Path("/usr/bin") and binary.is_file()
    return binary if is_script else command.resolve()


def write_launcher(
    directory: Path, chromium: Path, isolation: Isolation | None = None, cgroup: Path | None = None
) -> Launcher:
    """Write the start script into `directory`; `isolation` defaults to the best that this host can do.

    Given a `cgroup`, the browser enters it before it drops its rights, or does not start.
    """
    cage = _cage(chromium)
    if isolation is None:
        isolation = "bwrap" if _works(cage) else "flags"
        if isolation == "flags":
            _log.warning("bwrap does not run here: the browser is cut off by its flags and request filter alone")
    command = [*cage, str(chromium)] if isolation == "bwrap" else [str(chromium)]
    script, pid_file = directory / "chromium.sh", directory / "chromium.pid"
    lines = ["#!/bin/sh", f"echo $$ > {shlex.quote(str(pid_file))}"]
    if cgroup is not None:
        lines.append(f"echo $$ > {shlex.quote(str(cgroup / 'cgroup.procs'))} || exit 1")
    script.write_text("\n".join([*lines, f'exec {shlex.join(command)} "$@"', ""]))
    script.chmod(0o700)
    return Launcher(script, pid_file, isolation)


def _cage(chromium: Path) -> list[str]:
    command = []
    if os.geteuid() == 0:
        # bwrap started by root would own host files as root, whatever it drops afterwards.
        command += ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--"]
    command += ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    command += ["--setenv", "HOME", "/tmp", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64"):
        command += ["--symlink", f"usr/{name}", f"/{name}"]
    command += ["--ro-bind-try", "/etc/fonts", "/etc/fonts"]
    if not chromium.is_relative_to("/usr"):
        command += ["--ro-bind", str(chromium.parent), str(chromium.parent)]
    return [*command, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]


def _works(cage: list[str]) -> bool:
    try:
        probe = subprocess.run([*cage, "/usr/bin/true"], capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0
