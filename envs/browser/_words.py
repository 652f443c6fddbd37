"""The words of the compact form: they stand in for MiniWoB's name lists and random strings.

Each list is short, lower case and made of common words, so that a small model knows every token; the pages'
own scripts draw from them as they draw from their lists. `STRINGS` replaces `ui_utils.generateString`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_NAMES = _split(
    "anna bob carl dora emil fred gina hugo iris jack kate liam "
    "mara nils olga paul rosa sara tom vera will yara zoe ben"
)
_COUNTRIES = _split(
    "chile china cuba egypt france ghana greece india iran israel italy japan "
    "kenya malta mexico nepal norway oman peru poland qatar spain sudan togo"
)

STRINGS: Final = _split(
    "apple bird boat book bread chair cloud coat corn desk door drum "
    "fish flag frog glass grass hill horse house island key lamp leaf "
    "lemon milk moon mouse nail nest ocean paper pear pen piano plum "
    "pond queen rain ring river road rope salt sand ship shoe snow "
    "soap song star stone sugar table tiger train tree wheel wind wolf"
)

LISTS: Final[Mapping[str, tuple[str, ...]]] = {
    "PEOPLE_NAMES": _NAMES,
    "FIFTY_NAMES": _NAMES,
    "LAST_NAMES": _split("baker brown clark cook ford green hall king lee moore reed scott smith stone ward young"),
    "COUNTRIES": _COUNTRIES,
    "COLORS": _split("black blue brown gold gray green pink red silver white yellow"),
    "GENDERS": _split("female male"),
    "LANGUAGES": _split("arabic danish dutch english french german hindi italian korean latin spanish turkish"),
    "RELIGIONS": _split("buddhism hinduism islam judaism sikhism taoism"),
    "lorem_words": STRINGS,
}
