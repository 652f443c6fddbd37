"""MiniWoB++ pages in Chromium behind the environment interface.

Reward and end of an episode are the page's own: its raw reward without time decay, 1 for a full mark. A
page's clock stands still between steps, so the page's time limit never strikes; the environment's limits do.
The pages are the package's own and the agent only clicks, types and selects: a page that hangs or crashes is
ours to mend (`SandboxError`), never the agent's reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from palaestra.envs._base import Env, EnvLimits
from palaestra.envs._experts import Expert
from palaestra.envs._tools import ToolError, tool
from palaestra.envs.browser._expert import MiniWoBExpert
from palaestra.envs.browser._pages import COMPACT_PAGES, PAGES, TaskTable
from palaestra.envs.browser._screen import INSTRUCTIONS, Screen, first_text, next_text
from palaestra.envs.browser._shelf import TabShelf
from palaestra.envs.browser._stage import stage_site
from palaestra.errors import ConfigError, TaskError
from palaestra.sandboxes.browser import BrowserConfig, BrowserPool, Tab
from palaestra.types import JsonObject, Message, Observation, Split, Task

Ref = Annotated[int, Field(ge=1, le=99)]
Element = Annotated[str, Field(max_length=200, examples=[""])]
"""Kept with the episode and never checked: it makes the agent say what it means before it gives a number."""


class MiniWoB(Env):
    """One MiniWoB++ page for each episode, seen as an accessibility tree and acted on by the numbers in it."""

    env_id = "palaestra/MiniWoB-v0"
    default_limits = EnvLimits(max_turns=10)
    COMPACT_PAGES = COMPACT_PAGES

    def __init__(
        self,
        *,
        pages: Sequence[str] | None = None,
        browser: BrowserConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`pages` defaults to `COMPACT_PAGES` in the compact form, else to all; the rest is `Env`'s.

        Environments that share resources and `browser` share one Chromium. `browser` may be a table, as from TOML.
        """
        super().__init__(**kwargs)
        chosen = tuple(pages) if pages is not None else COMPACT_PAGES if self.form == "compact" else PAGES
        self._table = TaskTable(self.form, chosen)
        self._browser = _browser_config(browser)
        self.num_tasks = self._table.num_tasks
        self._shelf: TabShelf | None = None
        self._tab: Tab | None = None
        self._screen: Screen | None = None

    def make_task_data(self, split: Split, index: int) -> JsonObject:
        """The page's name and the seed of its problem."""
        return self._table.data(split, index)

    async def begin(self, task: Task) -> Observation:
        """Set the page up in a leased tab; raises `ConfigError` without a browser, `SandboxError` when it fails."""
        self._screen = None
        self._shelf = await self.resources.get(self._key, self._start_shelf)
        try:
            self._tab = await self._shelf.take()
            is_compact = self.form == "compact"
            reply = await self._tab.call("palaestra.begin", task.data["page"], str(task.data["seed"]), is_compact)
        except BaseException:
            await self.end()
            raise
        self._screen = Screen.from_reply(reply)
        message = Message("user", first_text(self._screen, self.form))
        return (message,) if self.form == "compact" else (Message("system", INSTRUCTIONS), message)

    async def verify(self) -> Mapping[str, float]:
        """`page_reward` is the page's raw reward in [-1, 1], 0 if it gave none; `success` is 1 for a full mark."""
        screen = self._screen
        reward = screen.reward if screen is not None and screen.is_done else 0.0
        return {"success": float(reward >= 1.0), "page_reward": reward}

    async def end(self) -> None:
        """Give the tab back."""
        tab, self._tab = self._tab, None
        if self._shelf is not None and tab is not None:
            await self._shelf.give_back(tab)

    def expert(self) -> Expert:
        """Solves every supported page from the observations of either form."""
        return MiniWoBExpert()

    @tool
    async def click(self, *, element: Element = "", ref: Ref) -> str:
        """Click the control with this number; `element` says in words which one is meant."""
        return await self._act("click", ref, "")

    @tool
    async def type(self, *, element: Element = "", ref: Ref, text: str) -> str:
        """Replace the text of the text field with this number; `element` says in words which one is meant."""
        return await self._act("type", ref, text)

    @tool
    async def select(self, *, element: Element = "", ref: Ref, option: str) -> str:
        """Choose an option of the list with this number; where several may be chosen, choosing again undoes it."""
        return await self._act("select", ref, option)

    @property
    def _key(self) -> tuple[str, BrowserConfig]:
        return ("miniwob browser", self._browser)

    async def _start_shelf(self) -> TabShelf:
        config = self._browser.model_copy(update={"frames_on_request": True})  # the stage is driven by script alone
        return TabShelf(await BrowserPool.start(stage_site(PAGES), config), config)

    async def _act(self, kind: str, ref: int, text: str) -> str:
        if self._tab is None or self._screen is None:
            raise TaskError("no page is open: call reset()")
        reply = await self._tab.call("palaestra.act", kind, ref, text)
        if "refused" in reply:
            raise ToolError(reply["refused"])
        before, self._screen = self._screen, Screen.from_reply(reply)
        if self._screen.is_done:
            self.finish()
        return next_text(before, self._screen, self.form)


def _browser_config(given: BrowserConfig | Mapping[str, Any] | None) -> BrowserConfig:
    if isinstance(given, BrowserConfig):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"browser must be a table, not {given!r}")
    return BrowserConfig.parse(given or {}, source="browser")
