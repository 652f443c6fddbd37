"""One Chromium for each test module: starting it takes longer than most of its tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from palaestra.errors import ConfigError
from palaestra.resources import Resources
from palaestra.sandboxes.browser import find_chromium
from tests.conftest import require


@pytest.fixture(scope="session")
def chromium() -> None:
    """Skips, or fails, when there is no Chromium."""
    try:
        find_chromium()
    except ConfigError as error:
        require("chromium", str(error))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def resources(chromium: None) -> AsyncIterator[Resources]:
    """Shared by a module's environments, so that they share a browser."""
    async with Resources() as resources:
        yield resources
