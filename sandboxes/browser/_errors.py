"""How a leased tab fails, and by whose doing."""

from __future__ import annotations

from typing import Literal

from palaestra.errors import SandboxError

By = Literal["page", "browser"]
"""`page`: its content hung, crashed, closed or exhausted it. `browser`: the browser, its driver or the host failed."""

Ended = Literal["timeout", "crash", "oom", "closed", "address", "killed", "died", "lifetime"]
"""`address`: there is nothing to show at an address. `killed`: the page's process got a signal from outside.
`died`: the browser or its driver is gone. `lifetime`: the lease was held for too long."""


class TabError(SandboxError):
    """The page or the browser stopped answering.

    `by` says whose doing it was; the environment decides what that means. Where the agent controls the page's
    content, `page` is the agent's outcome: catch it and answer with an observation. Where the content is
    trusted, let it pass: as a `SandboxError` it never becomes a reward.
    """

    def __init__(self, message: str, by: By = "browser", ended: Ended = "died") -> None:
        super().__init__(message)
        self.by: By = by
        self.ended: Ended = ended
