"""Registration: Gymnasium's registry is the one registry; here stands which of its ids are ours and a family's."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import gymnasium

from palaestra.config import nearest
from palaestra.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Registration:
    """One registered environment: its id, where its class is, its family and one line about it."""

    env_id: str
    entry_point: str
    family: str
    summary: str


_registrations: dict[str, Registration] = {}


def register(env_id: str, entry_point: str, *, family: str, summary: str) -> None:
    """Register an environment class, given as `package.module:Class`, under `namespace/Name-vN`.

    Afterwards `gymnasium.make(env_id)`, suites and the command line know it. The class is imported when
    first made. Registering an id again replaces it.
    """
    _registrations[env_id] = Registration(env_id, entry_point, family, summary)
    gymnasium.registry.pop(env_id, None)
    gymnasium.register(env_id, entry_point=entry_point, order_enforce=False, disable_env_checker=True)


def registrations() -> tuple[Registration, ...]:
    """All registered environments, by id."""
    return tuple(_registrations[key] for key in sorted(_registrations))


def registration(env_id: str) -> Registration:
    """The registration of one id; raises `ConfigError` with the nearest known id."""
    if env_id not in _registrations:
        raise ConfigError(f"unknown environment {env_id!r}{nearest(env_id, list(_registrations))}")
    return _registrations[env_id]


def load_class(env_id: str) -> type:
    """The class behind an id; raises `ConfigError` when its module or a part it needs is missing."""
    module, _, name = registration(env_id).entry_point.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"{env_id} needs a package that is not installed: {error}") from error
    if loaded is None:
        raise ConfigError(f"{env_id}: {module} has no {name!r}")
    if not isinstance(loaded, type):
        raise ConfigError(f"{env_id}: {registration(env_id).entry_point} is not a class")
    return loaded
