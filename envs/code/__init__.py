"""Code environments: a function to repair, tests that decide, a sandbox around both."""

from palaestra.envs.code._repair import CodeRepair

__all__ = ["CodeRepair"]
