"""Isolated boxes that environments lease: one protocol, back ends chosen by name."""

from palaestra.sandboxes._backends import backend_names, check_backend, open_backend, register_backend
from palaestra.sandboxes._limits import Capability, Limits, SandboxSpec
from palaestra.sandboxes._managed import Admission, fork
from palaestra.sandboxes._pool import SandboxPool
from palaestra.sandboxes._protocol import Cut, Ended, ExecResult, Sandbox, SandboxBackend, Snapshot, Usage

__all__ = [
    "Admission",
    "Capability",
    "Cut",
    "Ended",
    "ExecResult",
    "Limits",
    "Sandbox",
    "SandboxBackend",
    "SandboxPool",
    "SandboxSpec",
    "Snapshot",
    "Usage",
    "backend_names",
    "check_backend",
    "fork",
    "open_backend",
    "register_backend",
]
