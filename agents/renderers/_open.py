"""Choosing the renderer of a model: the compact one for models of ours, else that of its family.

The heavy imports (tokenizers, transformers) happen here, when a renderer is opened.
"""

from __future__ import annotations

from pathlib import Path

from palaestra.agents._renderer import Renderer
from palaestra.agents.renderers._marker import family_of, has_own_format


def open_renderer(model_path: Path | str, *, family: str | None = None, is_thinking: bool = False) -> Renderer:
    """The renderer of a model folder or hub name.

    `family` names the chat format of a checkpoint that does not tell, such as a folder whose architecture serves
    many; `is_thinking` lets a family that can think aloud do so. Neither concerns models made by `palaestra`.
    Raises `ConfigError` when no append-only renderer is known.
    """
    folder = Path(model_path).expanduser()
    if has_own_format(folder):
        from palaestra.agents.renderers.compact import CompactRenderer

        return CompactRenderer.from_folder(folder)
    from palaestra.agents.renderers.family import open_family

    path = str(folder) if folder.is_dir() else str(model_path)
    return open_family(path, family=family_of(path, family), is_thinking=is_thinking)
