"""Renderers: the compact one for models made from scratch, and the `renderers` package for published families."""

from palaestra.agents.renderers._marker import MARKER, family_of, mark_family, read_marker
from palaestra.agents.renderers._open import open_renderer

__all__ = ["MARKER", "family_of", "mark_family", "open_renderer", "read_marker"]
