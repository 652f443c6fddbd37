"""The stage shows the pages as they are: the same tree as the package's page loaded by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.resources import files

import pytest
import pytest_asyncio

from palaestra.envs.browser._pages import PAGES
from palaestra.envs.browser._stage import ORIGIN, miniwob_root, page_parts, stage_site
from palaestra.errors import TaskError
from palaestra.sandboxes.browser import BrowserPool, Resource, Site

_HTML = "text/html; charset=utf-8"
_SEEDS = ("0", "7", "23")
_PLAIN = """
window.addEventListener('load', () => { palaestraClock.advance(1000); if (window.jQuery) jQuery.fx.off = true; });
window.plain = (seed) => {
  core.EPISODE_MAX_TIME = 2 ** 31;
  Math.seedrandom(seed);
  palaestraTree.reset();
  core.startEpisodeReal();
  palaestraClock.advance(1000);
  return [core.getUtterance(), palaestraTree.rows()];
};
"""


def _own(name: str) -> str:
    return files("palaestra.envs.browser").joinpath(name).read_text(encoding="utf-8")


def _site() -> Site:
    """The stage, and beside it every page as the package has it, with our clock before and our tree after it."""
    stage = stage_site(PAGES)

    def serve(path: str) -> Resource | None:
        if not path.startswith("/miniwob/"):
            return stage.find(ORIGIN + path)
        source = (miniwob_root() / path.lstrip("/")).read_text()
        source = source.replace("<head>", f"<head><script>{_own('clock.js')}</script>", 1)
        source = source.replace("</body>", f"<script>{_own('snapshot.js')}{_PLAIN}</script></body>", 1)
        return Resource(source.encode(), _HTML)

    return Site(stage.start_url, {ORIGIN: serve})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(chromium: None) -> AsyncIterator[BrowserPool]:
    pool = await BrowserPool.start(_site())
    yield pool
    await pool.aclose()


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("page", PAGES)
async def test_stage_and_page_agree(pool: BrowserPool, page: str) -> None:
    plain, staged = await pool.acquire(), await pool.acquire()
    await plain.page.goto(f"{ORIGIN}/miniwob/{page}.html")
    for seed in _SEEDS:
        reply = await staged.call("palaestra.begin", page, seed, False)
        assert [reply["utterance"], reply["rows"]] == await plain.call("plain", seed)
    await pool.release(staged)
    await pool.release(plain)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("page", ["login-user", "click-tab-2", "read-table-2", "form-sequence-2", "click-dialog-2"])
async def test_roles_and_names_are_chromiums(pool: BrowserPool, page: str) -> None:
    tab = await pool.acquire()
    reply = await tab.call("palaestra.begin", page, "5", False)
    session = await tab.page.context.new_cdp_session(tab.page)
    tree = await session.send("Accessibility.getFullAXTree")
    await pool.release(tab)
    known = {
        (node["role"]["value"], " ".join(node.get("name", {}).get("value", "").split()))
        for node in tree["nodes"]
        if not node["ignored"]
    }
    controls = {(role, name) for _, role, name, ref, _, _ in reply["rows"] if ref and role != "clickable"}
    assert controls
    assert controls <= known


def test_site_serves_nothing_outside_the_package() -> None:
    site = stage_site(["login-user"])
    assert site.find(ORIGIN + "/core/core.js") is not None
    for path in ("/../__init__.py", "/../../../../etc/passwd", "/nothing.html", "/", "//etc/passwd"):
        assert site.origins[ORIGIN](path) is None


def test_source_that_is_no_miniwob_page_is_refused() -> None:
    with pytest.raises(TaskError, match="not a MiniWoB page"):
        page_parts("<html><head></head><body></body></html>")
