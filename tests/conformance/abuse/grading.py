"""Attempts 54 to 57: early exits, planted modules, a patched grader, and a channel that no file needs.

The grader is the one of the code environments: the answers stay on the host, and what leaves the box is compared
there. The control is a grader that runs its assertions beside the tested code, as most do: it believes them all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from palaestra.envs.code._grading import grade
from palaestra.envs.code._tests import make_tests
from palaestra.sandboxes import Capability, Sandbox
from tests.conformance.abuse.scene import KIT, Scene, attempt

_TESTS = make_tests("f", lambda x: 7919 * x * x + 104729, [(number,) for number in range(2, 8)])
_HONEST = "def f(x): return 7919 * x * x + 104729"
_WALL_S = 3.0

_EXITS = (
    "import os\nos._exit(0)",
    "import sys\nsys.exit(0)",
    "raise SystemExit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "import sys\nsys.stdout.write('OK\\n[104729]\\n')\nsys.exit(0)",
    "import os\ndef f(x): os._exit(0)",
    "import os\nif os.fork(): os._exit(0)\ndef f(x): return 1",
)
_PLANTS = {
    "json.py": "dumps = lambda *a, **k: 'true'\nloads = lambda *a, **k: {}\n",
    "copy.py": "raise SystemExit(0)",
    "types.py": "raise SystemExit(0)",
    "sitecustomize.py": "import os; os._exit(0)",
    "usercustomize.py": "import os; os._exit(0)",
    "conftest.py": "import os; os._exit(0)",
    "solution.py": "raise SystemExit(0)",
    "unittest/__init__.py": "import os; os._exit(0)",
    "planted.pth": "import os; os._exit(0)",
    ".local/lib/python3.11/site-packages/usercustomize.py": "import os; os._exit(0)",
    ".local/lib/python3.11/site-packages/planted.pth": "import os; os._exit(0)",
}
_PATCHES = (
    "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef f(x): return 0",
    "import builtins\nclass E(AssertionError): pass\nbuiltins.AssertionError = E\ndef f(x): return 0",
    "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return 0",
    "class E(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\ndef f(x): return E(1)",
    "import json\njson.dumps = lambda *a, **k: 'true'\ndef f(x): return True",
    (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for scope in (frame.f_globals, frame.f_locals):\n"
        "        for value in list(scope.values()):\n            if isinstance(value, dict): value.clear()\n"
        "    frame = frame.f_back\ndef f(x): return 0"
    ),
    (
        "import gc\nkept = {}\n"
        "for one in gc.get_objects():\n    try:\n        if isinstance(one, (dict, list, tuple)):\n"
        "            for text in one.values() if isinstance(one, dict) else one:\n"
        "                if text in (136405, '136405'): kept[2] = 136405\n    except Exception: pass\n"
        "def f(x): return kept[x]"
    ),
    "import glob\nfor name in glob.glob('/workspace/**', recursive=True):\n    try: open(name, 'w').close()\n"
    "    except OSError: pass\ndef f(x): return 0",
)
_NAIVE = """
import sys
exec(compile(open("solution_under_test.py").read(), "solution", "exec"))
import unittest
class Test(unittest.TestCase):
    def test_it(self):
        self.assertEqual(f(2), 136405)
unittest.main(argv=["x"], exit=True)
"""


async def _passes(box: Sandbox, source: str) -> bool:
    return (await grade(box, source, _TESTS, wall_s=_WALL_S)).is_passed


async def _naive_passes(box: Sandbox, source: str) -> bool:
    await box.write_file("/workspace/solution_under_test.py", source.encode())
    return (await box.exec(["python3", "-c", _NAIVE])).is_ok


async def _naive_is_fooled(scene: Scene, sources: Sequence[str]) -> None:
    assert await _naive_passes(scene.box, _HONEST)
    assert not await _naive_passes(scene.box, "def f(x): return 0")
    assert any([await _naive_passes(scene.box, source) for source in sources])


async def _exits_fool(scene: Scene) -> None:
    await _naive_is_fooled(scene, _EXITS[:3])


@attempt(54, "exit-before-the-tests", control=_exits_fool)
async def _(scene: Scene) -> bool:
    passed = [await _passes(scene.box, source) for source in _EXITS]
    return not any(passed) and await _passes(scene.box, _HONEST)


async def _plants_fool(scene: Scene) -> None:
    await scene.box.write_file("/workspace/unittest/__init__.py", _PLANTS["unittest/__init__.py"].encode())
    assert await _naive_passes(scene.box, "def f(x): return 0")


@attempt(55, "planted-modules", control=_plants_fool)
async def _(scene: Scene) -> bool:
    await scene.box.put_tree({name: text.encode() for name, text in _PLANTS.items()})
    plant = "\n".join(f"open({f'/workspace/{name}'!r}, 'a').close()" for name in _PLANTS)
    passed = await _passes(scene.box, f"{plant}\ndef f(x): return 0")
    return not passed and await _passes(scene.box, _HONEST)


async def _patches_fool(scene: Scene) -> None:
    await _naive_is_fooled(scene, _PATCHES[:1])


@attempt(56, "patched-grader", control=_patches_fool)
async def _(scene: Scene) -> bool:
    passed = [await _passes(scene.box, source) for source in _PATCHES]
    assert not any(passed), passed
    fresh = await scene.make()
    return await _passes(fresh, _HONEST) and not await _passes(fresh, "def f(x): return 0")


_SIGNAL = """
fd = os.open(json.__file__, os.O_RDONLY)
for bit in told["bits"]:
    if bit == "1":
        fcntl.flock(fd, fcntl.LOCK_EX)
    print(bit, flush=True)
    time.sleep(0.4)
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


@attempt(57, "locks-on-a-shared-file", Capability.FILE_LOCKS)
async def _(scene: Scene) -> bool:
    receiver = await scene.make()
    sent: asyncio.Queue[str] = asyncio.Queue()
    bits = "101"

    async def send() -> None:
        stdin = json.dumps({"bits": bits}).encode()
        told = await scene.box.run_python(
            KIT + _SIGNAL, stdin=stdin, on_output=lambda _, bit: sent.put_nowait(bit.decode())
        )
        assert told.stdout.split() == [b"1", b"0", b"1"]

    received = ""
    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        for bit in bits:
            assert (await sent.get()).strip() == bit
            received += (await scene.ask(_RECEIVE, box=receiver))["bit"]
    assert received in (bits, "000"), received
    return received == "000"
