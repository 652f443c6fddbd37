"""A pool of browser pages behind one Chromium, without a network."""

from palaestra.sandboxes.browser._launch import find_chromium
from palaestra.sandboxes.browser._pool import BrowserConfig, BrowserPool
from palaestra.sandboxes.browser._tab import Resource, Site, Tab

__all__ = ["BrowserConfig", "BrowserPool", "Resource", "Site", "Tab", "find_chromium"]
