"""A run folder is taken over: what changed since it was last fitted is refused, or told and noted.

Invariant: no group mixes two rewards in one baseline, and none of an environment that left the suite is trained; what
is dropped for that is dropped before the change is on record, so that a kill in between leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from palaestra.errors import LedgerError
from palaestra.trainer._model_identity import identity_of
from palaestra.trainer.config import GRPOConfig
from palaestra.trainer.ledger import Ledger
from palaestra.trainer.resume import Say
from palaestra.trainer.run_rules import ENV_REMOVED, compare, reason_to_drop


async def take_over(
    ledger: Ledger, meta: Mapping[str, Any], config: GRPOConfig, *, allow: Collection[str], say: Say
) -> None:
    """Compare what the run was with what is asked for now; raises `LedgerError` for what may not change."""
    recorded, before = await ledger.meta(), await ledger.last_config()
    lines = compare({key: recorded.get(key) for key in meta}, meta, allow=allow)
    if before is not None:
        lines += compare({"train": before}, {"train": config.model_dump(mode="json")}, allow=allow)
    for line in lines:
        await say(line)
    await _drop_unplayable(ledger, recorded["suite"], meta["suite"], say)
    for key, value in meta.items():
        if recorded.get(key) != value:
            await ledger.amend_meta(key, value)


async def _drop_unplayable(ledger: Ledger, before: Mapping[str, Any], now: Mapping[str, Any], say: Say) -> None:
    """Groups in hand of an environment that left, and those half played by other rules; others keep their tasks."""
    dropped: Counter[tuple[str, str]] = Counter()
    in_hand = [(group.number, group.task.env_id, bool(group.ended)) for group in await ledger.open_groups()]
    whole = [(number, group.task.env_id, False) for number, group in await ledger.finished()]
    for number, env_id, is_half_played in in_hand + whole:
        reason = reason_to_drop(env_id, before, now)
        if reason == ENV_REMOVED or (reason is not None and is_half_played):
            await ledger.drop(number, reason)
            dropped[env_id, reason] += 1
    for (env_id, reason), count in dropped.items():
        await say(f"{count} groups in hand of {env_id} are dropped ({reason})")


async def settle_model(ledger: Ledger, model: str) -> None:
    """Hold what was loaded against the record; what a hub name stands for is recorded once it was fetched.

    Raises `LedgerError` when it is another model than the one that the run's episodes are of.
    """
    recorded, now = (await ledger.meta())["model"], await asyncio.to_thread(identity_of, model)
    if now == recorded:
        return
    if recorded != model and await ledger.next_number():
        raise LedgerError(
            f"{model} is no longer the model that this run was started with ({recorded}): give the folder of that "
            "revision as the model, or use another run folder"
        )
    await ledger.amend_meta("model", now)
