"""The closed word lists of the service desk: every word is one token for a vocabulary made for it."""

from __future__ import annotations

from typing import Literal

Level = Literal["low", "normal", "high", "urgent"]
Team = Literal["sales", "network", "billing", "repair", "legal"]

LEVELS: tuple[Level, ...] = ("low", "normal", "high", "urgent")
TEAMS: tuple[Team, ...] = ("sales", "network", "billing", "repair", "legal")

REFUNDABLE = ("lost", "broken")
"""Conditions of an order that the policy refunds."""
KEPT = ("used", "fine")
"""Conditions of an order for which the policy declines a refund."""

FIRST_NAMES = (
    "ana", "ben", "carl", "dora", "emil", "fay", "gus", "hana", "ivan", "june",
    "karl", "lena", "mona", "nils", "olga", "paul", "rosa", "sam", "tina", "vera",
)  # fmt: skip

LAST_NAMES = (
    "adams", "baker", "cole", "diaz", "evans", "ford", "gray", "hill", "irwin", "jones",
    "king", "lopez", "moss", "novak", "owens", "price", "quinn", "ruiz", "stone", "wolf",
)  # fmt: skip

ITEMS = (
    "printer", "mouse", "screen", "phone", "router", "laptop", "keyboard", "cable",
    "camera", "speaker", "scanner", "charger", "battery", "headset", "tablet", "modem",
    "server", "monitor", "drive", "lamp", "desk", "chair", "clock", "radio",
)  # fmt: skip
