"""What must be there before the main job begins: its engine, its environments' parts, and a model it can talk to."""

from __future__ import annotations

from palaestra.agents.engines import check_engine
from palaestra.agents.renderers import open_renderer
from palaestra.errors import ConfigError
from palaestra.sandboxes import check_backend
from palaestra.sandboxes.browser import find_chromium
from palaestra.trainer.quickstart._config import QuickstartConfig
from palaestra.trainer.quickstart._folder import RunFolder
from palaestra.trainer.quickstart._warm_up import link_model

_CODE, _BROWSER = "palaestra/CodeRepair-v0", "palaestra/MiniWoB-v0"


def check_parts(config: QuickstartConfig, folder: RunFolder) -> None:
    """Raise `ConfigError` in one line for what would fail after minutes; leaves a given model in `folder.base`."""
    check_engine(config.rl.engine)
    if _CODE in config.weights:
        _check_sandbox(str(config.options.get(_CODE, {}).get("sandbox", "jail")))
    if _BROWSER in config.weights:
        find_chromium()
    if config.model is not None:
        family = config.seeded_rl.family
        if folder.stage("model") is None:
            link_model(config.model, folder.base, family)
        open_renderer(folder.base, family=family)


def _check_sandbox(name: str) -> None:
    reason = check_backend(name)
    if reason is not None:
        raise ConfigError(f"{_CODE} cannot play here, its sandbox {name!r} does not work: {reason}")
