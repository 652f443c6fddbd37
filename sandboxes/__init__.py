"""Isolated boxes that environments lease: one protocol, back ends chosen by name."""

from palaestra.sandboxes._backends import backend_names, check_backend, open_backend, register_backend
from palaestra.sandboxes._pool import SandboxPool
from palaestra.sandboxes._protocol import Ended, ExecResult, Limits, Sandbox, SandboxBackend, SandboxSpec

__all__ = [
    "Ended",
    "ExecResult",
    "Limits",
    "Sandbox",
    "SandboxBackend",
    "SandboxPool",
    "SandboxSpec",
    "backend_names",
    "check_backend",
    "open_backend",
    "register_backend",
]
