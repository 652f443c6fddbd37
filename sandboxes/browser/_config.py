"""What one pool of browser tabs may use."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from palaestra.config import Config
from palaestra.sandboxes.browser._launch import Isolation

SHARE_OF_ALL = 3
"""One part in so many of `memory_mb` may be in use by the processes that serve all leases."""


class BrowserConfig(Config):
    """Limits and deadlines of one browser pool."""

    isolation: Isolation = "bwrap"
    """`bwrap`: in a cage with an empty network. `flags`: where bubblewrap cannot run, by Chromium's flags alone."""
    frames_on_request: bool = False
    """Draw no frame that nobody asks for, a third less CPU time. For pages driven by script alone: with headless
    shell, Playwright's `click` and `screenshot` then wait for a frame that never comes."""
    max_tabs: Annotated[int, Field(ge=1)] = 16
    """Tabs leased at once; further leases wait. One costs about 100 MB."""
    num_ready: Annotated[int, Field(ge=0)] = 1
    """Fresh tabs kept open beside the leased ones, so that a lease need not wait for one."""
    max_pages: Annotated[int, Field(ge=1)] = 5
    """Pages of one lease, the first included; popups beyond are closed."""
    memory_mb: Annotated[int, Field(ge=256)] = 3072
    """Memory of all the browser's processes together, where the host has memory cgroups. A third of it may be in the
    processes that serve all leases: beyond that, the lease that was busiest meanwhile ends."""
    driver_mb: Annotated[int, Field(ge=256)] = 1024
    """Memory of Playwright's driver, likewise."""
    heap_mb: Annotated[int, Field(ge=8)] = 32
    """JavaScript heap of one page's process; a page that needs more crashes."""
    leases_per_browser: Annotated[int, Field(ge=1)] = 2000
    """Leases after which another browser takes over; this one ends with its last lease."""
    max_pss_mb: Annotated[int, Field(ge=16)] = 2560
    """Memory in use, shared pages counted in part, above which another browser takes over likewise."""
    lifetime_s: Annotated[float, Field(gt=0)] = 3600.0
    """Length of a lease, in seconds, from its beginning or from when it was renewed last; then the pool ends it."""
    episodes_per_lease: Annotated[int, Field(ge=1)] = 500
    """Episodes for which an environment with trusted pages of its own may set one leased tab up anew."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Browsers that may die within `restart_window_s` and be replaced; after that leases fail."""
    restart_window_s: Annotated[float, Field(gt=0)] = 60.0
    """See `max_restarts`, in seconds."""
    launch_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Start of the browser, in seconds."""
    load_timeout_s: Annotated[float, Field(gt=0)] = 20.0
    """Opening of one tab, in seconds."""
    lease_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Waiting for a free tab, in seconds."""
    call_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """One call into a page, in seconds; then the page counts as hung."""
    close_timeout_s: Annotated[float, Field(gt=0)] = 3.0
    """Closing of one tab, in seconds; then the whole browser is killed."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for name in ("max_pss_mb", "heap_mb"):
            if getattr(self, name) >= self.memory_mb:
                raise ValueError(f"{name} = {getattr(self, name)} must be below memory_mb = {self.memory_mb}")
        for name in ("call_timeout_s", "load_timeout_s"):
            if getattr(self, name) >= self.lifetime_s:
                raise ValueError(f"{name} = {getattr(self, name):g} must be below lifetime_s = {self.lifetime_s:g}")
        return self
