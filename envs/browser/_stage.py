"""MiniWoB's pages as one site for the browser pool: a stage document with the libraries and every page's parts.

Invariant: a page's style, markup and script are the package's own text; nothing outside the package and this
folder is served.
"""

from __future__ import annotations

import json
import mimetypes
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from palaestra.envs.browser import _words
from palaestra.errors import ConfigError, TaskError
from palaestra.sandboxes.browser import Resource, Site

ORIGIN = "http://miniwob.palaestra.invalid"
_STAGE_PATH = "/stage.html"

# The union of what the pages load, in their order; a page sees libraries it does not use, which changes nothing.
_STYLES = (
    "core/core.css",
    "core/jquery-ui/jquery-ui.min.css",
    "common/special/navigate-tree/jquery.treeview.css",
    "common/special/dropdown/selectric.css",
)
_SCRIPTS = (
    "core/core.js",
    "core/d3.v3.min.js",
    "core/jquery-ui/external/jquery/jquery.js",
    "core/jquery-ui/jquery-ui.min.js",
    "core/jquery-ui-hacks.js",
    "common/ui_utils.js",
    "common/special/navigate-tree/jquery.treeview.min.js",
    "common/special/dropdown/jquery.selectric.js",
    "common/special/search-engine/jquery.twbsPagination.min.js",
)


def miniwob_root() -> Path:
    """The HTML folder of the installed `miniwob` package; raises `ConfigError` when it is not installed."""
    spec = find_spec("miniwob")
    if spec is None or spec.origin is None:
        raise ConfigError("MiniWoB needs the package miniwob: run `pip install palaestra[browser]`")
    return Path(spec.origin).parent / "html"


def stage_site(pages: Sequence[str]) -> Site:
    """The site whose start document can set up each of `pages`."""
    root = miniwob_root()
    document = _document(root, pages).encode()

    def serve(path: str) -> Resource | None:
        if path == _STAGE_PATH:
            return Resource(document, "text/html; charset=utf-8")
        return _read(root, path)

    return Site(ORIGIN + _STAGE_PATH, {ORIGIN: serve})


@cache
def _read(root: Path, path: str) -> Resource | None:
    file = (root / path.lstrip("/")).resolve()
    if not (file.is_relative_to(root.resolve()) and file.is_file()):
        return None
    return Resource(file.read_bytes(), mimetypes.guess_type(file.name)[0] or "application/octet-stream")


def _own(name: str) -> str:
    return files("palaestra.envs.browser").joinpath(name).read_text(encoding="utf-8")


def _document(root: Path, pages: Sequence[str]) -> str:
    parts = {page: page_parts((root / "miniwob" / f"{page}.html").read_text()) for page in pages}
    data = json.dumps({"pages": parts, "words": {**_words.LISTS, "strings": _words.STRINGS}})
    safe = data.replace("</", "<\\/")  # a page's own markup must not close our script element
    styles = "".join(f'<link rel="stylesheet" href="/{path}">' for path in _STYLES)
    scripts = "".join(f'<script src="/{path}"></script>' for path in _SCRIPTS)
    own = "".join(f"<script>{_own(name)}</script>" for name in ("snapshot.js", "stage.js"))
    head = f"<script>{_own('clock.js')}</script>{styles}{scripts}<script>palaestraData = {safe}</script>{own}"
    return f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>MiniWoB</title>{head}</head><body></body></html>'


def page_parts(source: str) -> dict[str, str]:
    """Style, script and body of a MiniWoB page; raises `TaskError` when it is not built like one."""
    head, found, rest = source.partition("</head>")
    body = re.search(r"<body[^>]*>(.*)</body>", rest, re.DOTALL)
    if not found or body is None or "genProblem" not in head:
        raise TaskError("not a MiniWoB page: no head, body or genProblem")
    return {
        "style": "\n".join(re.findall(r"<style>(.*?)</style>", head, re.DOTALL)),
        "script": "\n".join(re.findall(r"<script>(.*?)</script>", head, re.DOTALL)),
        "body": body[1],
    }
