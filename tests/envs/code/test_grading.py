"""The grader cannot be fooled: attacks that claim success, hide failure or look for the answers."""

from __future__ import annotations

import json

import pytest

from palaestra.envs.code import CodeRepair
from palaestra.envs.code._grading import Answer, Grade, first_wrong_line, grade
from palaestra.envs.code._tests import Tests, make_tests
from palaestra.envs.code._workspace import Workspace
from palaestra.resources import Resources
from palaestra.sandboxes import Ended, ExecResult
from tests.envs.code.conftest import call, play

_WALL_S = 2.0
_TESTS = make_tests("f", lambda x: x * x, [(number,) for number in range(2, 8)])

_ATTACKS = {
    "exit at once": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "exit inside": "import os\ndef f(x): os._exit(0)",
    "raise SystemExit": "def f(x): raise SystemExit(0)",
    "equals everything": "class E:\n    __eq__ = lambda s, o: True\n    __repr__ = lambda s: '4'\ndef f(x): return E()",
    "int that equals everything": "class E(int):\n    __eq__ = lambda s, o: True\ndef f(x): return E(1)",
    "prints answers": "print('[4]\\n[9]\\n[16]\\n[25]\\n[36]\\n[49]')\ndef f(x): return None",
    "patches json": "import json\njson.dumps = lambda *a, **k: 'true'\ndef f(x): return True",
    "patches the driver": (
        "import sys\nframe = sys._getframe(1)\nframe.f_globals['answer'] = lambda value: None\n"
        "frame.f_globals['request']['calls'].clear()\ndef f(x): return 0"
    ),
    "looks for the answers": (
        "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o]\n"
        "def f(x): return found[0]['expected'][x - 2]"
    ),
    "imports the reference": "from palaestra.envs.code._full_tasks import ALGORITHMS\ndef f(x): return x * x",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "plants modules": (
        "for name in ('json', 'sitecustomize', 'copy', 'types'):\n"
        "    open(f'/workspace/{name}.py', 'w').write('raise SystemExit(0)')\ndef f(x): return 1"
    ),
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\ndef f(x): return x * x",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos._exit(0)",
    "never ends": "def f(x):\n    while True: pass",
    "floods": "import os\nwhile True: os.write(1, b'[4]\\n' * 10000)",
    "floods every descriptor": (
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[4]\\n[9]\\n[16]\\n[25]\\n[36]\\n[49]\\n1\\n')\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "nests deeply": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[' * 60000 + b'\\n')\n"
    "    except OSError: pass\ndef f(x): return 0",
    "takes all memory": "def f(x): return len(bytearray(1 << 34))",
    "is no Python": "def f(x: return",
    "has no function": "g = 1",
    "is binary": "\0",
    "returns a set": "def f(x): return {x * x}",
    "returns a float": "def f(x): return float(x * x)",
    "returns a huge number": "def f(x): return 10 ** 100000",
    "is right once": "def f(x): return 4",
}


@pytest.mark.parametrize("attack", sorted(_ATTACKS))
async def test_attack_is_not_passed(attack: str, workspace: Workspace) -> None:
    result = await workspace.grade(_ATTACKS[attack], _TESTS, wall_s=_WALL_S)
    assert not result.is_passed
    assert result.share <= 1 / 6
    # the control: whatever the attack left behind does not hurt an honest answer after it
    assert (await workspace.grade("def f(x): return x * x", _TESTS, wall_s=_WALL_S)).is_passed


async def test_honest_code_may_print_exit_handlers_and_be_slow_to_flush(workspace: Workspace) -> None:
    source = "import atexit\natexit.register(print, 'bye')\nprint('[0]')\ndef f(x):\n    print(x)\n    return x * x"
    result = await workspace.grade(source, _TESTS, wall_s=_WALL_S)
    assert result.is_passed
    assert result.printed.splitlines()[0] == "[0]"


async def test_answers_before_a_limit_count(workspace: Workspace) -> None:
    source = "def f(x):\n    while x == 5: pass\n    return x * x"
    result = await workspace.grade(source, _TESTS, wall_s=1.0)
    assert result.passed == (True, True, True, False, False, False)
    assert (result.share, result.is_passed) == (0.5, False)
    assert result.answers[3].error == "the time limit was reached"


async def test_a_call_that_raises_does_not_stop_the_others(workspace: Workspace) -> None:
    result = await workspace.grade("def f(x): return 1 // (x - 3) * 0 + x * x", _TESTS, wall_s=_WALL_S)
    assert result.passed == (True, False, True, True, True, True)
    assert "ZeroDivisionError" in result.answers[1].error


async def test_errors_hide_addresses(workspace: Workspace) -> None:
    result = await workspace.grade("def f(x): raise ValueError(object())", _TESTS, wall_s=_WALL_S)
    assert result.answers[0].error == "ValueError: <object object at 0x...>"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["[1, 2, 3]", "[4, 5, 6]"], 4),  # no difference after any line but the last: the last
        (["[1, 2, 0]", "[4, 5, 6]"], 3),
        (["[1, 2, 0]", "[4, 0, 6]"], 2),  # the first over all calls
        (["[1, 0, 3]", "[0, 0, 6]"], 1),
        (["[1, 2, 3]", "[4, 5]"], 1),  # no list of that length
        (["[1, 2, 3]", ""], 1),  # the call failed
        (["[1, 2, 3]", "7"], 1),
    ],
)
def test_the_first_wrong_line_is_the_first_differing_step(given: list[str], line: int) -> None:
    steps = Tests("f", ((1,), (2,)), ("[1, 2, 3]", "[4, 5, 6]"))
    answers = tuple(Answer(text=text, error="" if text else "ValueError: x") for text in given)
    assert first_wrong_line(Grade(steps, answers, Ended.EXIT, ""), num_lines=4) == line


async def test_a_destroyed_box_is_replaced(workspace: Workspace) -> None:
    await workspace.write("note.txt", "kept")
    await workspace.grade(_ATTACKS["takes all memory"], _TESTS, wall_s=_WALL_S)
    await workspace.grade(_ATTACKS["kills everything"], _TESTS, wall_s=_WALL_S)
    assert await workspace.read("note.txt") == "kept"


class _Recorder:
    """A box that keeps what it was sent."""

    id = "recorder"

    def __init__(self) -> None:
        self.sent = b""

    async def run_python(self, code: str, *, stdin: bytes = b"", wall_s: float | None = None) -> ExecResult:
        self.sent += code.encode() + stdin
        return ExecResult(
            ended=Ended.EXIT,
            exit_code=0,
            signal=None,
            stdout=b"",
            stderr=b"",
            stdout_total=0,
            stderr_total=0,
            wall_s=0.0,
        )


async def test_expected_values_never_enter_the_box() -> None:
    tests = Tests("f", ((1,), (2,)), ("987654321", "123456789"))
    box = _Recorder()
    result = await grade(box, "def f(x): return x", tests, wall_s=1.0)  # type: ignore[arg-type]
    assert json.dumps([[1], [2]]).encode() in box.sent
    assert b"987654321" not in box.sent
    assert b"123456789" not in box.sent
    assert result.share == 0.0


@pytest.mark.parametrize("attack", ["exit at once", "imports the reference", "plants modules", "prints answers"])
async def test_a_whole_episode_is_not_fooled(attack: str, sandbox: str, resources: Resources) -> None:
    env = CodeRepair(sandbox=sandbox, resources=resources)
    waiting = [call("write", content=_ATTACKS[attack]), call("run"), call("done")]
    played = await play(env, lambda env, conversation: waiting.pop(0), index=1)
    assert played.facts == {"success": 0.0, "tests_passed": 0.0, "unsafe": 0.0}
    await env.aclose()
