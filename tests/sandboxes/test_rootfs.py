"""The userland's folder: where it is, who can read it, what is left of old ones."""

from __future__ import annotations

import pytest

from palaestra.errors import ConfigError
from palaestra.sandboxes._rootfs import cache_folder


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(ConfigError, match="set HOME or XDG_CACHE_HOME"):
        cache_folder()
