"""MiniWoB++ pages as environments: real Chromium, accessibility tree, actions by reference."""

from palaestra.envs.browser._miniwob import MiniWoB

__all__ = ["MiniWoB"]
