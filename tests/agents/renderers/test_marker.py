"""The chat family of a model: found by marker, hub name or architecture, and kept by every copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from palaestra.agents.renderers import family_of, mark_family, open_renderer
from palaestra.agents.renderers.family import FAMILIES, FamilyRenderer
from palaestra.errors import ConfigError
from palaestra.trainer._learner_files import copy_companions
from palaestra.trainer.quickstart._warm_up import link_model


def folder_of(place: Path, tokenizer: Path, model_type: str) -> Path:
    shutil.copytree(tokenizer, place)
    (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    return place


@pytest.mark.parametrize(("model_type", "family"), [("qwen3", "qwen3"), ("qwen3_moe", "qwen3"), ("llama", None)])
def test_an_architecture_tells_the_family_where_it_has_but_one(
    tmp_path: Path, qwen_folder: Path, model_type: str, family: str | None
) -> None:
    assert family_of(folder_of(tmp_path / "model", qwen_folder, model_type)) == family


def test_every_deduced_family_is_one_of_the_renderers_package() -> None:
    from palaestra.agents.renderers._marker import _BY_ARCHITECTURE

    assert set(_BY_ARCHITECTURE.values()) <= set(FAMILIES)


def test_a_qwen3_that_calls_tools_otherwise_is_not_taken_for_qwen3(tmp_path: Path, qwen_folder: Path) -> None:
    folder = folder_of(tmp_path / "coder", qwen_folder, "qwen3_moe")
    (folder / "chat_template.jinja").write_text("<tool_call>\n<function=name>")
    with pytest.raises(ConfigError, match="--family"):
        open_renderer(folder)
    assert family_of(folder, "prime-qwen3") == "prime-qwen3"


def test_names_of_the_hub_and_its_cache_tell_the_family(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3.5-2B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert family_of("Qwen/Qwen3-0.6B") == "qwen3"
    assert family_of(snapshot) == "qwen3.5"
    assert family_of("nobody/nothing") is None


def test_a_marked_folder_and_its_copies_open_without_a_name(tmp_path: Path, qwen_folder: Path) -> None:
    model = folder_of(tmp_path / "model", qwen_folder, "llama")
    link_model(str(model), tmp_path / "base", "qwen3")
    (tmp_path / "export").mkdir()
    copy_companions(tmp_path / "base", tmp_path / "export")
    for folder in (tmp_path / "base", tmp_path / "export"):
        assert isinstance(open_renderer(folder), FamilyRenderer)
    assert "palaestra" not in json.loads((model / "tokenizer_config.json").read_text())


def test_a_model_of_ours_has_no_family_and_stays_as_it_is(tmp_path: Path, compact_folder: Path) -> None:
    shutil.copytree(compact_folder, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    mark_family(tmp_path, family_of(tmp_path, "qwen3"))
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


def test_companions_are_all_that_a_tokenizer_needs(tmp_path: Path, qwen_folder: Path) -> None:
    source = folder_of(tmp_path / "source", qwen_folder, "llama")
    kept = {"chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json"}
    left = {"model.safetensors", "learner.pt", "model.safetensors.index.json"}
    for name in kept | left:
        (source / name).write_text("{}")
    (tmp_path / "out").mkdir()
    copy_companions(source, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert kept <= copied
    assert copied.isdisjoint(left | {"config.json"})
