"""A model is the same one wherever its folder lies; a run moved with its folder goes on."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import NoReturn

import pytest

from palaestra.envs import EnvSuite
from palaestra.errors import ConfigError, LedgerError
from palaestra.resources import Resources
from palaestra.trainer import GRPOConfig, Trainer
from palaestra.trainer._model_identity import identity_beside, identity_of, place_of
from palaestra.trainer._take_over import settle_model
from palaestra.trainer.checkpoints import Checkpoints
from palaestra.trainer.learner import LocalLearner
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.replay import _recorded_model
from tests.toys import ToyEngine, ToyLearner, register_echo
from tests.trainer.test_ledger import make_task

register_echo()

NAME = "some/model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights" * 10)
    return folder


def test_a_path_written_otherwise_or_moved_is_the_same_model(model: Path, tmp_path: Path) -> None:
    before = identity_of(str(model))
    assert identity_of(os.path.relpath(model)) == before
    assert identity_of(str(shutil.move(model, tmp_path / "elsewhere"))) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{}"),
        ("model.safetensors", b"weighty" * 10),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{}"),
        ("chat_template.jinja", b"{{ messages }}"),
    ],
)
def test_another_configuration_tokenizer_or_template_or_other_weights_are_another_model(
    model: Path, name: str, content: bytes
) -> None:
    (model / "tokenizer.json").write_bytes(b"[]" + bytes(2 << 20))
    before = identity_of(str(model))
    (model / "README.md").write_text("about it")
    assert identity_of(str(model)) == before
    (model / name).write_bytes(content)
    assert identity_of(str(model)) != before


def test_a_change_far_down_a_tokenizer_is_seen(model: Path) -> None:
    (model / "tokenizer.json").write_bytes(bytes(2 << 20) + b"a")
    before = identity_of(str(model))
    (model / "tokenizer.json").write_bytes(bytes(2 << 20) + b"b")
    assert identity_of(str(model)) != before


def test_a_run_names_its_model_so_that_it_is_found_from_any_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer("model", run=tmp_path / "run")._write_config(EnvSuite({"test/Echo-v0": 1.0}))
    monkeypatch.chdir("/")
    found = _recorded_model(tmp_path / "run")
    assert found == str(model)
    assert identity_of(found) == identity_of(str(model))
    assert place_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's models, empty; who looks at the network fails."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    return tmp_path / "hub"


def fetch(hub: Path, model: Path, revision: str, name: str = NAME) -> Path:
    """Put a model into the cache as a download does: files by content, a snapshot of links, and `main` upon it."""
    place = hub / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / (revision * 40)
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        blob = place / "blobs" / f"{revision}-{path.name}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).unlink(missing_ok=True)
        (snapshot / path.name).symlink_to(blob)
    (place / "refs" / "main").write_text(revision * 40)
    return snapshot


def test_a_hub_name_is_known_by_the_content_that_it_stands_for_here(hub: Path, model: Path) -> None:
    assert identity_of(NAME) == NAME, "nothing was fetched"
    snapshot = fetch(hub, model, "a")
    assert identity_of(NAME) == identity_of(str(snapshot)) == identity_of(str(model)) != NAME
    (model / "chat_template.jinja").write_text("{{ messages }}")
    fetch(hub, model, "b")
    assert identity_of(NAME) == identity_of(str(model)) != identity_of(str(snapshot))


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "of two", "index"])
def test_a_snapshot_of_which_only_a_part_was_fetched_is_a_name(hub: Path, model: Path, lost: str) -> None:
    shards = {"a": "model.safetensors", "b": "model-2.safetensors"}
    if lost in ("of two", "index"):
        index = {"weight_map": shards} if lost == "of two" else 1
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (model / lost).unlink()
    (model / "tokenizer.json").write_text("{}")
    fetch(hub, model, "a")
    assert identity_of(NAME) == NAME
    if lost == "of two":
        (model / "model-2.safetensors").write_bytes(b"more")
        fetch(hub, model, "a")
        assert identity_of(NAME) == identity_of(str(model))


def test_weights_that_are_not_loaded_make_no_other_model(model: Path) -> None:
    before = identity_of(str(model))
    (model / "pytorch_model.bin").write_bytes(b"the same, in the old format")
    assert identity_of(str(model)) == before
    (model / "model.safetensors").unlink()
    assert identity_of(str(model)) != before


async def settle(run: Path, started: str, model: str) -> str:
    """What is on record of the model after a learner loaded one, in a life of a run."""
    ledger = await Ledger.open(run, meta={"model": started})
    try:
        await settle_model(ledger, model)
        recorded: str = (await ledger.meta())["model"]
        return recorded
    finally:
        await ledger.aclose()


async def sample(run: Path) -> None:
    ledger = await Ledger.open(run, meta={})
    await ledger.issue(0, make_task(0), 1)
    await ledger.aclose()


async def test_what_a_name_stands_for_is_recorded_once_it_was_fetched_and_then_it_must_stay(
    hub: Path, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert await settle(run, identity_of(NAME), NAME) == NAME
    assert identity_beside(NAME, NAME) == NAME
    snapshot = fetch(hub, model, "a")
    assert identity_beside(NAME, NAME) == NAME, "the name is all that is on record"
    first = await settle(run, NAME, NAME)
    assert first == identity_of(str(model))
    await sample(run)
    (model / "tokenizer.json").write_text("{}")
    fetch(hub, model, "b")
    assert identity_beside(first, NAME) != first, "which is refused before anything starts"
    with pytest.raises(LedgerError, match=f"{NAME} is no longer the model that this run was started with .*folder"):
        await settle(run, first, NAME)
    assert await settle(run, first, str(snapshot)) == identity_beside(first, str(snapshot)) == first
    shutil.rmtree(hub)
    assert identity_beside(first, NAME) == first, "not known before it is fetched"
    assert identity_beside(NAME, "other/name") == "other/name"


async def test_until_something_is_sampled_the_hub_may_give_a_newer_revision(
    hub: Path, model: Path, tmp_path: Path
) -> None:
    fetch(hub, model, "a")
    started = identity_of(NAME)
    (model / "tokenizer.json").write_text("{}")
    fetch(hub, model, "b")
    assert await settle(tmp_path / "run", started, NAME) == identity_of(str(model)) != started


async def test_a_learner_that_loaded_another_revision_is_closed_before_it_is_used(
    hub: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fetched(ToyLearner):
        is_closed = False

        async def step(self, rows: object) -> NoReturn:
            pytest.fail("used")

        async def aclose(self) -> None:
            self.is_closed = True

    learner, engine = Fetched(), ToyEngine(lambda prompt, seed: [0])

    async def start(*args: object, **kwargs: object) -> Fetched:
        (model / "tokenizer.json").write_text("{}")
        fetch(hub, model, "b")
        return learner

    monkeypatch.setattr(LocalLearner, "start", start)
    fetch(hub, model, "a")
    trainer = Trainer(NAME, run=tmp_path / "run")
    ledger = await Ledger.open(trainer.run, meta={"model": identity_of(NAME)})
    await ledger.issue(0, make_task(0), 1)
    async with Resources() as own:
        with pytest.raises(ExceptionGroup) as caught:
            await trainer._open_models(own, ledger, Checkpoints(tmp_path / "none"), engine, trainer._stalls())
    assert caught.group_contains(LedgerError, match="no longer the model")
    assert learner.is_closed
    await ledger.aclose()


def test_a_folder_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        identity_of(str(tmp_path))


def test_a_model_without_a_chat_format_is_refused_before_anything_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("started")

    monkeypatch.setattr(LocalLearner, "start", fail)
    monkeypatch.setattr("palaestra.trainer.trainer.open_engine", fail)
    trainer = Trainer(model, GRPOConfig(engine="transformers"), run=tmp_path / "run")
    with pytest.raises(ConfigError, match="give its family"):
        trainer.fit(EnvSuite({"test/Echo-v0": 1.0}))
    assert not (tmp_path / "run").exists()
