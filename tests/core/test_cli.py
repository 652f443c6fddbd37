"""The command line: what can be read is JSON, mistakes are one line that helps, exit codes say which."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import PALAESTRA, assert_one_line, run

ROOT = Path(__file__).parents[2]


def test_envs_lists_ours_as_json() -> None:
    rows = json.loads(run("envs", "--json").stdout)
    assert {row["family"] for row in rows} == {"code", "browser", "tools"}


def test_one_environment_is_described_with_its_tools() -> None:
    value = json.loads(run("envs", "palaestra/ToolDesk-v0", "--json").stdout)
    assert "find_customer" in [tool["function"]["name"] for tool in value["tools"]]
    assert set(value["num_tasks"]) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    "command", [[], ["envs"], ["eval"], ["train"], ["size"], ["replay"], ["quickstart"], ["doctor"]]
)
def test_every_command_has_help(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_eval_prints_success_with_intervals() -> None:
    done = run("eval", "expert", "--env", "palaestra/ToolDesk-v0", "--tasks", "4", "--form", "compact", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["success"]["rate"] == 1.0
    assert report["success"]["count"] == 4


def test_eval_keeps_episodes(tmp_path: Path) -> None:
    out = tmp_path / "episodes.jsonl"
    done = run("eval", "random", "--env", "palaestra/ToolDesk-v0", "--tasks", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 3


ENDED_BY_A_SIGNAL = """
import asyncio, os, sys
from tests.toys import Echo, register_echo
register_echo()
async def begin(self, task):
    child = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        os.kill(os.getpid(), {number})
        await child.wait()
    except KeyboardInterrupt:
        print("the signal broke into what ran at that moment", file=sys.stderr)
        raise
    finally:
        child.kill()
        await child.wait()
Echo.begin = begin
"""


@pytest.mark.parametrize("ignored", ["", "INT"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_inside_an_episode_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, ignored: str
) -> None:
    # a background job of a script ignores Ctrl-C from its start, and then asyncio takes no signal
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    (tmp_path / "my_envs.py").write_text(ENDED_BY_A_SIGNAL.format(number=number.value))
    arguments = ["eval", "expert", "--env", "test/Echo-v0", "--import", "my_envs", "--tasks", "1"]
    done = run_ignoring(ignored, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "palaestra: interrupted; nothing was kept\n")


def test_a_closed_terminal_ends_nothing_under_nohup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    (tmp_path / "my_envs.py").write_text(
        "import os, signal\nfrom tests.toys import Echo, register_echo\nregister_echo()\nbegin = Echo.begin\n"
        "def hang_up(self, task):\n    os.kill(os.getpid(), signal.SIGHUP)\n    return begin(self, task)\n"
        "Echo.begin = hang_up\n"
    )
    arguments = ["eval", "expert", "--env", "test/Echo-v0", "--import", "my_envs", "--tasks", "1", "--json"]
    done = run_ignoring("HUP", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["success"]["count"] == 1


def run_ignoring(names: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that ignored these signals when it started."""
    command = ["sh", "-c", f'trap "" {names or "USR1"}; exec "$0" "$@"', str(PALAESTRA), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=150, cwd=cwd, stdin=subprocess.DEVNULL
    )


def test_unknown_environment_names_the_nearest() -> None:
    done = run("eval", "random", "--env", "palaestra/ToolDusk-v0")
    assert_one_line(done, "unknown environment", "did you mean 'palaestra/ToolDesk-v0'")


def test_model_folder_that_does_not_load(tmp_path: Path) -> None:
    done = run("eval", str(tmp_path / "nothing"), "--env", "palaestra/ToolDesk-v0")
    assert_one_line(done, "nothing")


def test_missing_configuration_file(tmp_path: Path) -> None:
    assert_one_line(run("train", str(tmp_path / "none.toml")), "no such configuration file")


JOB = 'model = "x"\n[suite.weights]\n"palaestra/ToolDesk-v0" = 1.0\n'


@pytest.mark.parametrize(("command", "text"), [(["size"], JOB), (["doctor"], JOB), (["quickstart", "--config"], "")])
def test_what_cannot_be_read_is_refused_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], text: str
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'src'}")
    assert_one_line(run(*command, "none.toml", cwd=tmp_path), "no such configuration file: none.toml")
    (tmp_path / "none.toml").write_text(text)
    assert "torch was imported" in run(*command, "none.toml", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('model = "x"\n[suite.wieghts]\na = 1\n', ("unknown key 'suite.wieghts'", "did you mean 'weights'")),
        ('model = "x"\n[suite]\nweights = {}\n[train]\nmax_lag = 0\n', ("train: max_lag 0 is synchronous",)),
        ('model = "x"\n[suite\n', ("cannot read",)),
        ("[suite]\nweights = {}\n", ("model: Field required",)),
    ],
)
def test_mistakes_in_a_configuration(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert_one_line(run("train", str(path)), *words)


def test_quickstart_refuses_an_unknown_key(tmp_path: Path) -> None:
    done = run("quickstart", "--set", "rl.stepz=3", cwd=tmp_path)
    assert_one_line(done, "unknown key 'rl.stepz'", "did you mean 'steps'")
    assert list(tmp_path.iterdir()) == []


def test_missing_chromium_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALAESTRA_CHROMIUM", str(tmp_path / "no-chromium"))
    done = run("eval", "random", "--env", "palaestra/MiniWoB-v0", "--tasks", "1")
    assert_one_line(done, "no-chromium")


MODULE_OF_A_USER = """
from tests.toys import register_echo
register_echo()
"""


def test_a_users_module_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "my_envs.py").write_text(MODULE_OF_A_USER)
    arguments = ("eval", "expert", "--import", "my_envs", "--env", "test/Echo-v0", "--tasks", "2", "--json")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["success"]["count"] == 2
    text = 'model = "nowhere"\nimports = ["my_envs"]\n[suite.weights]\n"test/Echo-v0" = 1.0\n'
    (tmp_path / "run.toml").write_text(text)
    assert_one_line(run("train", "run.toml", cwd=tmp_path), "no append-only chat format is known for 'nowhere'")


@pytest.mark.parametrize("command", ["eval", "train", "size"])
def test_a_module_that_does_not_import_is_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "run.toml").write_text("")
    arguments = ["random", "--env", "palaestra/ToolDesk-v0"] if command == "eval" else ["run.toml"]
    done = run(command, *arguments, "--import", "broken", cwd=tmp_path)
    assert_one_line(done, "cannot import 'broken'", "ZeroDivisionError")


def test_eval_without_an_answer_says_why_and_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    broken = MODULE_OF_A_USER + "from palaestra.envs import register\nfrom tests.toys import Echo\n"
    broken += "class Broken(Echo):\n    env_id = 'test/Broken-v0'\n"
    broken += "    async def verify(self):\n        from palaestra.errors import SandboxError\n"
    broken += '        raise SandboxError("the judge is gone")\n'
    broken += 'register("test/Broken-v0", "my_envs:Broken", family="toy", summary="fails")\n'
    (tmp_path / "my_envs.py").write_text(broken)
    arguments = ("eval", "expert", "--import", "my_envs", "--env", "test/Broken-v0", "--tasks", "2")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "2 episodes failed on our side" in done.stdout
    assert "the judge is gone" in done.stdout
    assert "nan" not in run(*arguments, "--json", cwd=tmp_path).stdout.lower()
