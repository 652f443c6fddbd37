"""Which real parts this machine has: for each, None, or why it cannot be used."""

from __future__ import annotations

import functools
import importlib.util

from palaestra.errors import ConfigError
from palaestra.sandboxes import check_backend
from palaestra.sandboxes.browser import find_chromium


@functools.cache
def missing_vllm() -> str | None:
    """Whether vLLM can be imported."""
    return None if importlib.util.find_spec("vllm") else "vllm is not installed"


@functools.cache
def missing_bwrap() -> str | None:
    """Whether a jail can be made."""
    return check_backend("jail")


@functools.cache
def missing_chromium() -> str | None:
    """Whether a Chromium is there."""
    try:
        find_chromium()
    except ConfigError as error:
        return str(error)
    return None
