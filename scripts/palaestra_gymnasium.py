"""Registers Palaestra's environments when Gymnasium is imported; loaded at start by `palaestra_gymnasium.pth`.

Costs a start of Python one small import. Nothing of Palaestra or Gymnasium is imported before the user imports
Gymnasium, and then only Gymnasium's registry is touched.
"""

from __future__ import annotations

import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def environments() -> dict[str, str]:
    """Entry points by id, from the `environments.toml` of Palaestra's packages; finding it does not import it."""
    import tomllib
    from pathlib import Path

    spec = find_spec("palaestra")
    found = {}
    for folder in (spec and spec.submodule_search_locations) or ():
        for manifest in Path(folder).glob("envs/*/environments.toml"):
            for name, entry in tomllib.loads(manifest.read_text(encoding="utf-8")).items():
                found[entry["id"]] = f"palaestra.envs.{manifest.parent.name}:{name}"
    return found


class _AfterImport(Loader):
    """Runs the real loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            for env_id, entry_point in environments().items():
                if env_id not in module.registry:
                    module.register(env_id, entry_point=entry_point, order_enforce=False, disable_env_checker=True)
        except (OSError, ValueError, KeyError, TypeError, module.error.Error) as error:
            # a damaged Palaestra must not take Gymnasium down with it, which others use as well
            warnings.warn(f"not all of Palaestra's environments are registered: {error!r}; reinstall it", stacklevel=2)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "gymnasium":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterImport(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
