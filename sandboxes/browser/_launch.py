"""Which Chromium to start, with which flags, and in which cage.

Covers: no network (an empty network namespace, and flags that hold without one), no host file outside /usr and
the fonts, no process outlives its parent, memory of all processes together where the caller has a cgroup.
Invariant: nothing is started with less isolation than was asked for. Does not cover: escapes from the renderer
through the kernel: inside the cage Chromium's own sandbox is off.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from palaestra.errors import ConfigError

Isolation = Literal["bwrap", "flags"]
"""`bwrap`: own namespaces, empty network. `flags`: Chromium's flags and the request filter alone."""

_CANDIDATES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_NOBODY = "65534"
_PROBE_TIMEOUT_S = 10.0
_PROBES = 3
_BETWEEN_PROBES_S = 0.2

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


FRAMES_ON_REQUEST_FLAGS = (
    # Only headless shell has them.
    "--enable-begin-frame-control",
    "--run-all-compositor-stages-before-draw",
)


_OWN_PROFILE = """\
num=$#
for word; do
    case $word in --user-data-dir=*) rm -rf -- "${{word#--user-data-dir=}}"; word={profile};; esac
    set -- "$@" "$word"
done
shift $num"""


@dataclass(frozen=True, slots=True)
class Launcher:
    """A start script for Playwright's `executable_path`, and the file in which it leaves its process id."""

    script: Path
    pid_file: Path

    def read_pid(self) -> int:
        """Process id of the browser's outermost process."""
        return int(self.pid_file.read_text())


def flags_for(chromium: Path, heap_mb: int, frames_on_request: bool) -> tuple[str, ...]:
    """Command-line flags for this Chromium, with a limit for each page's JavaScript heap."""
    # Small young generations: a used tab stays near 100 MB instead of 160, at no cost in time.
    heap = f"--js-flags=--max-old-space-size={heap_mb} --max-semi-space-size=1"
    extra = FRAMES_ON_REQUEST_FLAGS if frames_on_request and "headless-shell" in chromium.name else ()
    return (*FLAGS, heap, *extra)


def find_chromium(environ: Mapping[str, str] = os.environ) -> Path:
    """The Chromium to use; `PALAESTRA_CHROMIUM` overrides. Raises `ConfigError` when there is none."""
    named = environ.get("PALAESTRA_CHROMIUM")
    if named:
        if not (os.path.isfile(named) and os.access(named, os.X_OK)):
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


def write_launcher(directory: Path, chromium: Path, isolation: Isolation, cgroup: Path | None = None) -> Launcher:
    """Write the start script into `directory`; raises `ConfigError` when this machine cannot isolate like that.

    Given a `cgroup`, the browser enters it before it drops its rights, or does not start. Playwright's folder for
    the profile, which has no owner, is exchanged for one in `directory`.
    """
    command = [str(chromium)]
    if isolation == "bwrap":
        reason = why_no_cage(chromium)
        if reason is not None:
            raise ConfigError(
                f"{reason}; or ask for isolation = 'flags', which keeps the browser from the network alone"
            )
        command = [*_cage(chromium), *command]
    script, pid_file = directory / "chromium.sh", directory / "chromium.pid"
    lines = ["#!/bin/sh", f"echo $$ > {shlex.quote(str(pid_file))}"]
    if cgroup is not None:
        lines.append(f"echo $$ > {shlex.quote(str(cgroup / 'cgroup.procs'))} || exit 1")
    lines += [_OWN_PROFILE.format(profile=shlex.quote(f"--user-data-dir={directory / 'profile'}"))]
    script.write_text("\n".join([*lines, f'exec {shlex.join(command)} "$@"', ""]))
    script.chmod(0o700)
    return Launcher(script, pid_file)


def why_no_cage(chromium: Path) -> str | None:
    """Why no browser can be caged here, with the remedy, or None when it can; blocks, tries more than once."""
    for program in ("bwrap", "setpriv") if os.geteuid() == 0 else ("bwrap",):
        if shutil.which(program) is None:
            return f"the browser cannot be caged: no {program}: run `apt-get install bubblewrap util-linux`"
    reason = ""
    for attempt in range(_PROBES):
        time.sleep(attempt * _BETWEEN_PROBES_S)
        try:
            command = [*_cage(chromium), "/usr/bin/true"]
            probe = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
            continue
        if probe.returncode == 0:
            return None
        reason = probe.stderr.decode(errors="replace").strip() or f"bwrap ended with {probe.returncode}"
    return f"the browser cannot be caged: {reason}: allow user namespaces (`palaestra doctor` names the setting)"


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
