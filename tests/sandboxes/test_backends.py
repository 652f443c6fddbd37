"""Names, probes, the userland and the filter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import palaestra.sandboxes
from palaestra.errors import ConfigError
from palaestra.sandboxes import _backends, backend_names, check_backend, open_backend, register_backend
from palaestra.sandboxes._rootfs import cache_folder, ensure_rootfs
from palaestra.sandboxes._seccomp import filter_program


async def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'docker'"):
        await open_backend("dokcer")
    assert check_backend("jial") == "unknown sandbox back end 'jial'; did you mean 'jail'?"


async def test_a_new_backend_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_factories", dict(_backends._factories))

    async def factory() -> palaestra.sandboxes.SandboxBackend:
        raise ConfigError("told by the factory")

    register_backend("mine", factory)
    assert backend_names() == ("docker", "jail", "mine", "podman", "subprocess")
    assert check_backend("mine") == "told by the factory"
    with pytest.raises(ConfigError, match="already"):
        register_backend("jail", factory)


def test_missing_parts_are_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    for name, remedy in (("jail", "install the package 'bubblewrap'"), ("docker", "start one")):
        reason = check_backend(name)
        assert reason is not None
        assert remedy in reason
        assert "\n" not in reason


def test_import_does_not_load_docker() -> None:
    code = "import sys, palaestra.sandboxes; print('docker' in sys.modules, 'requests' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout == "False False\n"


def test_all_is_sorted_and_real() -> None:
    names = palaestra.sandboxes.__all__
    assert names == sorted(names)
    assert all(hasattr(palaestra.sandboxes, name) for name in names)


def test_the_userland_is_built_once_and_complete_for_all_who_build_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from palaestra.sandboxes._rootfs import ensure_rootfs; print(ensure_rootfs().path)"
    tmp_path.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    if os.geteuid() == 0:
        # pytest's folders are closed to others, and then root would take /var/cache
        monkeypatch.setattr("palaestra.sandboxes._rootfs._is_open_to_all", lambda _: True)
        code = f"import palaestra.sandboxes._rootfs as r; r._is_open_to_all = lambda _: True; {code}"
    command = [sys.executable, "-P", "-c", code]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    paths = {builder.communicate(timeout=120)[0] for builder in builders}
    assert len(paths) == 1
    root = Path(paths.pop().strip())
    assert root.parent.parent.parent == tmp_path
    assert sorted(path.suffix for path in root.parent.iterdir()) == ["", ".lock"]
    for name in ("bin/sh", "usr/bin/python3", "proc", "tmp", "workspace", "dev", "palaestra/seccomp.bpf"):
        assert (root / name).exists(), name


def test_root_never_caches_where_others_cannot_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cache_folder() == Path("/var/cache/palaestra")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cache_folder() == closed / "palaestra"


def test_the_userland_holds_no_writable_or_privileged_file() -> None:
    for path in ensure_rootfs().path.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o7022 == 0, path


@pytest.mark.parametrize(("machine", "is_known"), [("x86_64", True), ("aarch64", True), ("sparc", False)])
def test_the_filter_is_whole_instructions_and_absent_for_unknown_machines(machine: str, is_known: bool) -> None:
    program = filter_program(machine)
    assert len(program) % 8 == 0
    assert bool(program) == is_known
