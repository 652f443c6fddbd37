"""A pool of fresh browser tabs behind one Chromium, without a network."""

from palaestra.sandboxes.browser._config import BrowserConfig
from palaestra.sandboxes.browser._errors import TabError
from palaestra.sandboxes.browser._launch import find_chromium, why_no_cage
from palaestra.sandboxes.browser._pool import BrowserPool
from palaestra.sandboxes.browser._site import STRICT_POLICY, Resource, Site
from palaestra.sandboxes.browser._tab import Tab

__all__ = [
    "STRICT_POLICY",
    "BrowserConfig",
    "BrowserPool",
    "Resource",
    "Site",
    "Tab",
    "TabError",
    "find_chromium",
    "why_no_cage",
]
