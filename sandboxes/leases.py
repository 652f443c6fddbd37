"""The sandboxes on this machine, whoever made them: list them, and clear what killed runs left."""

from palaestra.sandboxes._reaper import Reaped, reap
from palaestra.sandboxes._records import Lease, Record, boot_s, list_leases, process_handle

__all__ = ["Lease", "Reaped", "Record", "boot_s", "list_leases", "process_handle", "reap"]
