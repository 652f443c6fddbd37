"""A service desk: a SQLite database behind an HTTP server, changed through typed tools."""

from palaestra.envs.desk._env import ToolDesk

__all__ = ["ToolDesk"]
