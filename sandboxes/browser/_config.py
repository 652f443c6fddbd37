"""What one pool of browser tabs may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from palaestra.config import Config


class BrowserConfig(Config):
    """Limits and deadlines of one browser pool."""

    max_tabs: Annotated[int, Field(ge=1)] = 16
    """Tabs leased at once; further leases wait. One costs about 100 MB."""
    num_ready: Annotated[int, Field(ge=0)] = 1
    """Fresh tabs kept open beside the leased ones, so that a lease need not wait for one."""
    max_pages: Annotated[int, Field(ge=1)] = 5
    """Pages of one lease, the first included; popups beyond are closed."""
    memory_mb: Annotated[int, Field(ge=256)] = 3072
    """Memory of all the browser's processes together, where the host has memory cgroups."""
    heap_mb: Annotated[int, Field(ge=8)] = 32
    """JavaScript heap of one page's process; a page that needs more crashes."""
    leases_per_browser: Annotated[int, Field(ge=1)] = 2000
    """Leases after which another browser takes over; this one ends with its last lease."""
    max_pss_mb: Annotated[int, Field(ge=16)] = 2560
    """Memory in use, shared pages counted in part, above which another browser takes over likewise."""
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
