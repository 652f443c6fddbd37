"""Renderers: the compact one for models made from scratch, and the `renderers` package for published families."""

from palaestra.agents.renderers._marker import MARKER, family_of, has_own_format, mark_family
from palaestra.agents.renderers._open import open_renderer

__all__ = ["MARKER", "family_of", "has_own_format", "mark_family", "open_renderer"]
