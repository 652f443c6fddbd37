"""One Chromium for each test module: starting it takes longer than most of its tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from palaestra.resources import Resources
from tests.sandboxes.pages import require_chromium


@pytest.fixture(scope="session")
def chromium() -> None:
    """Skips, or fails, when there is no Chromium."""
    require_chromium()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def resources(chromium: None) -> AsyncIterator[Resources]:
    """Shared by a module's environments, so that they share a browser."""
    async with Resources() as resources:
        yield resources
