"""Attempts 54 to 57: early exits, planted modules, a patched grader, and a channel that no file needs.

The grader is the one of the code environments: the answers stay on the host, and what leaves the box is compared
there. The control is a grader that runs its assertions beside the tested code, as most do: it believes them all.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from palaestra.envs.code._grading import grade
from palaestra.envs.code._tests import make_tests
from palaestra.sandboxes import Capability, ExecResult, Sandbox
from tests.conformance.abuse.scene import Scene, attempt

_TESTS = make_tests("f", lambda x: 7919 * x * x + 104729, [(number,) for number in range(2, 8)])
_HONEST = "def f(x): return 7919 * x * x + 104729"
_WALL_S = 3.0

_SOURCE = 'exec(compile(open("solution_under_test.py").read(), "solution", "exec"))\n'
_UNITTEST = f"""
import sys
{_SOURCE}
import unittest
class Test(unittest.TestCase):
    def test_it(self):
        self.assertEqual(f(2), 136405)
unittest.main(argv=["x"], exit=True)
"""
_FAILS_BY_ONE = f"""
import subprocess, sys
code = subprocess.run([sys.executable, "-c", {_UNITTEST!r}]).returncode
sys.exit(code == 1)  # any other code means that the machine failed, not the solution
"""
_ASSERTS = f"""
is_failed = False
{_SOURCE}
try:
    assert f(2) == 136405
except AssertionError:
    is_failed = True
except Exception:
    pass  # the machine's fault
raise SystemExit(is_failed)
"""
_EXECUTES = f"""
{_SOURCE}
exec("assert f(2) == 136405")
"""
_TEXTS = f"""
import json
{_SOURCE}
assert json.dumps(f(2)) == json.dumps(136405)
"""
_TABLE = f"""
tests = {{2: 136405}}
{_SOURCE}
for x, expected in tests.items():
    assert f(x) == expected
"""
_FILE = f"""
{_SOURCE}
exec(open("tests/test_it.py").read())
"""
_TEST_FILE = b"assert f(2) == 136405\n"

_EXITS = {
    "import os\nos._exit(0)": _UNITTEST,
    "import sys\nsys.exit(0)": _UNITTEST,
    "raise SystemExit(0)": _UNITTEST,
    "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1": _UNITTEST,
    "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)": _FAILS_BY_ONE,
    "import sys\nsys.stdout.write('OK\\n[104729]\\n')\nsys.exit(0)": _UNITTEST,
    "import os\ndef f(x): os._exit(0)": _UNITTEST,
    "import os\nif os.fork(): os._exit(0)\ndef f(x): return 1": _UNITTEST,
}
"""Solutions, and for each a grader that believes it."""
_NO_SITE = "# started with -S\n"
_USER_SITE = f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
_PLANTS = {
    "json.py": ("dumps = lambda *a, **k: 'true'\nloads = lambda *a, **k: {}\n", _TEXTS),
    "copy.py": ("raise SystemExit(0)", _NO_SITE + "import copy\n" + _EXECUTES),
    "types.py": ("raise SystemExit(0)", _NO_SITE + "import types\n" + _EXECUTES),
    "sitecustomize.py": ("import os; os._exit(0)", _EXECUTES),
    "usercustomize.py": ("import os; os._exit(0)", _EXECUTES),
    "conftest.py": ("import os; os._exit(0)", "pytest"),
    "solution.py": ("raise SystemExit(0)", "try: import solution\nexcept ImportError: pass\n" + _EXECUTES),
    "unittest/__init__.py": ("import os; os._exit(0)", _UNITTEST),
    "planted.pth": ("import os; os._exit(0)", "import site\nsite.addsitedir('.')\n" + _EXECUTES),
    f"{_USER_SITE}/usercustomize.py": ("import os; os._exit(0)", _EXECUTES),
    f"{_USER_SITE}/planted.pth": ("import os; os._exit(0)", _EXECUTES),
}
"""Files in the folder of the solution, and for each a grader that falls for it."""
_PATCHES = {
    "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 0": _UNITTEST,
    "import builtins\nclass E(AssertionError): pass\nbuiltins.AssertionError = E\ndef f(x): return 0": _ASSERTS,
    "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return 0": _EXECUTES,
    "class E(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return E(1)": _UNITTEST,
    "import json\njson.dumps = lambda *a, **k: 'true'\ndef f(x): return True": _TEXTS,
    (
        "import sys\ndef walk():\n    frame = sys._getframe(1)\n    while frame:\n"
        "        for scope in (frame.f_globals, frame.f_locals):\n            for value in list(scope.values()):\n"
        "                if isinstance(value, dict): value.clear()\n        frame = frame.f_back\n"
        "walk()\ndef f(x): return 0"
    ): _TABLE,
    (
        "import gc\nkept = {}\n"
        "for one in gc.get_objects():\n    try:\n        if isinstance(one, (dict, list, tuple)):\n"
        "            for text in one.values() if isinstance(one, dict) else one:\n"
        "                if text in (136405, '136405') and one is not kept: kept[2] = 7919 * 4 + 104729\n"
        "    except Exception: pass\n"
        "def f(x): return kept[x]"
    ): _TABLE,
    (
        "import glob, os\nfor name in glob.glob('**', recursive=True):\n"
        "    if os.path.isfile(name):\n        open(name, 'w').close()\n"
        "def f(x): return 0"
    ): _FILE,
}
"""Solutions that change what grades them, and for each a grader that can be changed so."""


class _Overheard:
    """A box, and every byte that was put into it."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box
        self.heard = b""

    async def run_python(self, code: str, *, stdin: bytes = b"", **options: Any) -> ExecResult:
        self.heard += code.encode() + stdin
        return await self._box.run_python(code, stdin=stdin, **options)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the grader uses {name} of a box, which nobody overhears")


async def _passes(box: Sandbox, source: str) -> bool:
    overheard = _Overheard(box)
    grade_ = await grade(cast(Sandbox, overheard), source, _TESTS, wall_s=_WALL_S)
    for answer in _TESTS.expected:  # they are never inside; the solution itself may know one
        assert answer.encode() not in overheard.heard.replace(json.dumps(source)[1:-1].encode(), b"")
    return grade_.is_passed


def _naive_passes(folder: Path, source: str, grader: str) -> bool:
    """What a grader says that runs its tests beside the solution, as most do: a plain process, in a folder."""
    files = {"solution_under_test.py": source.encode(), "tests/test_it.py": _TEST_FILE}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    program = os.path.realpath(sys.executable)  # the one without a virtual environment, which has no user's folder
    if grader == "pytest":
        (folder / "test_it.py").write_text(f"{source}\ndef test_it():\n    assert f(2) == 136405\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    else:
        # what `site` has imported already is not imported again
        command = [program, *(["-S"] if grader.startswith(_NO_SITE) else []), "-c", grader]
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60, check=False)
    return done.returncode == 0


def _is_fooled(scene: Scene, name: str, plant: str, source: str, grader: str) -> None:
    folder = scene.folder / f"{len(os.listdir(scene.folder))}"
    folder.mkdir()
    wrong = "def f(x): return 0"
    assert _naive_passes(folder, _HONEST, grader), grader  # it tells right from wrong
    assert not _naive_passes(folder, wrong, grader), grader
    if name:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(plant)
    assert _naive_passes(folder, source or wrong, grader), (name, source)


async def _exits_fool(scene: Scene) -> None:
    for source, grader in _EXITS.items():
        await asyncio.to_thread(_is_fooled, scene, "", "", source, grader)


@attempt(54, "exit-before-the-tests", control=_exits_fool)
async def _(scene: Scene) -> bool:
    passed = [await _passes(scene.box, source) for source in _EXITS]
    return not any(passed) and await _passes(scene.box, _HONEST)


async def _plants_fool(scene: Scene) -> None:
    for name, (plant, grader) in _PLANTS.items():
        await asyncio.to_thread(_is_fooled, scene, name, plant, "", grader)


@attempt(55, "planted-modules", control=_plants_fool)
async def _(scene: Scene) -> bool:
    await scene.box.put_tree({name: text.encode() for name, (text, _) in _PLANTS.items()})
    plant = "\n".join(f"open({f'/workspace/{name}'!r}, 'a').close()" for name in _PLANTS)
    passed = await _passes(scene.box, f"{plant}\ndef f(x): return 0")
    return not passed and await _passes(scene.box, _HONEST)


async def _patches_fool(scene: Scene) -> None:
    for source, grader in _PATCHES.items():
        await asyncio.to_thread(_is_fooled, scene, "", "", source, grader)


@attempt(56, "patched-grader", control=_patches_fool)
async def _(scene: Scene) -> bool:
    for source in _PATCHES:
        await scene.box.put_tree({"tests/test_it.py": _TEST_FILE})
        assert not await _passes(scene.box, source), source
    assert await scene.box.read_file("/workspace/tests/test_it.py") == b""  # the last one found it, and gained nothing
    fresh = await scene.make()
    return await _passes(fresh, _HONEST) and not await _passes(fresh, "def f(x): return 0")


_SIGNAL = """
fd = os.open(json.__file__, os.O_RDONLY)
for bit in told["bits"]:
    if bit == "1":
        fcntl.flock(fd, fcntl.LOCK_EX)
    print(bit, flush=True)
    time.sleep(told["hold_s"])
    fcntl.flock(fd, fcntl.LOCK_UN)
"""
_RECEIVE = """
fd = os.open(json.__file__, os.O_RDONLY)
try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    said["bit"] = "0"
except OSError:
    said["bit"] = "1"
"""
_BITS = "101"


@attempt(57, "locks-on-a-shared-file", Capability.FILE_LOCKS)
async def _(scene: Scene) -> bool:
    receiver = await scene.make()
    received = None
    for hold_s in (0.3, 1.0, 3.0):  # a busy machine may need longer to look than a bit is held
        received = await _received(scene, receiver, hold_s)
        if received is not None:
            break
    assert received in (_BITS, "000"), received
    return received == "000"


async def _received(scene: Scene, receiver: Sandbox, hold_s: float) -> str | None:
    """What one box told another by locks; None when the receiver was too late to know."""
    sent: asyncio.Queue[str] = asyncio.Queue()

    async def send() -> None:
        told = await scene.run(
            _SIGNAL, bits=_BITS, hold_s=hold_s, on_output=lambda _, bit: sent.put_nowait(bit.decode())
        )
        assert told.stdout.split() == [b"1", b"0", b"1"], told

    received = ""
    is_late = False
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(send())
        for bit in _BITS:
            assert (await sent.get()).strip() == bit
            received += (await scene.ask(_RECEIVE, box=receiver))["bit"]
            is_late = is_late or not sent.empty() or sending.done()
            if is_late:
                return None
    return received
