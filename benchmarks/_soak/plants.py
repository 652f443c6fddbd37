"""What a harness leaves behind on purpose, to see that the soak finds it; each ends by itself after a while."""

from __future__ import annotations

import os
import subprocess

from palaestra.sandboxes.leases import Record

_LASTS_S = 15
_SCRIPTS = {
    # it keeps the harness's stdout, as any child does that nobody took care of
    "process": ":",
    "container": "docker run -d --rm --label palaestra.planted=1 --entrypoint sleep $IMAGE $LASTS >&2",
    "cgroup": "mkdir -p $MEMORY/palaestra-$PID-planted/deep; "
    "trap 'rmdir $MEMORY/palaestra-$PID-planted/deep $MEMORY/palaestra-$PID-planted' EXIT",
    "engine's cgroup": "mkdir -p $MEMORY/docker/$ID; trap 'rmdir $MEMORY/docker/$ID' EXIT",
    "mount": "mkdir /var/lib/planted-$PID; mount -t tmpfs planted /var/lib/planted-$PID; "
    "trap 'umount /var/lib/planted-$PID; rmdir /var/lib/planted-$PID' EXIT",
    "folder": "mkdir $TMPDIR/palaestra-leases-planted-$PID",
    "folder elsewhere": "mkdir /dev/shm/palaestra-planted-$PID; trap 'rmdir /dev/shm/palaestra-planted-$PID' EXIT",
    "cut record": ": > $LEASES/planted-$PID.json",
}
KINDS = tuple(_SCRIPTS)


def plant(kind: str) -> None:
    """Leave it, and a process that takes it away again."""
    listed = Record.write(lease_id=f"plants-{os.getpid()}", backend="", label="", handle="", lifetime_s=60.0)
    listed.remove()
    images = (
        ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}", "palaestra/base"]
        if kind == "container"
        else ["true"]
    )
    image = subprocess.run(images, capture_output=True, text=True, check=True).stdout.split()
    is_version_1 = os.path.isdir("/sys/fs/cgroup/memory")
    variables = {
        "PID": str(os.getpid()),
        "ID": os.urandom(32).hex(),
        "IMAGE": image[0] if image else "",
        "LASTS": str(_LASTS_S),
        "MEMORY": "/sys/fs/cgroup/memory" if is_version_1 else "/sys/fs/cgroup",
        "LEASES": f"{os.environ['TMPDIR']}/palaestra-leases-{os.geteuid()}",
    }
    script = f"{_SCRIPTS[kind]}\necho planted >&2\nsleep $LASTS"
    command = ["setsid", "sh", "-c", script]
    # not awaited: it is what is left
    process = subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.PIPE)
    assert process.stderr is not None
    while b"planted\n" not in process.stderr.readline():
        assert process.poll() is None
