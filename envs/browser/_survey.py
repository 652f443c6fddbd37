"""Which seeds of which pages are tasks: plays every seed with the expert and writes `tasks.json`.

Run it as `python -m palaestra.envs.browser._survey [PAGE...]` after a change to the words, the pages or the wording;
it takes minutes, and keeps the pages that are not named. A seed
is a task when the expert solves it and, in the compact form, when it is short and takes two to four calls. A
content (the first observation) is used once and belongs to the split that its hash says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from palaestra.envs.browser._miniwob import MiniWoB
from palaestra.envs.browser._pages import COMPACT_PAGES, LETTERS, PAGES
from palaestra.envs.browser._view import read
from palaestra.resources import Resources
from palaestra.types import Form, Message, Split, Task

_MAX_SEEDS = {"compact": 1000, "full": 200}
_MAX_TASKS = {"compact": 400, "full": 150}
_NUM_PAGES_AT_ONCE = 4
_MIN_CONTENTS = 20
_CALLS = range(2, 5)
_MAX_FIRST_WORDS = 40
_MAX_LATER_WORDS = 25
_MAX_REF = 12
_YEARS = range(2000, 2018)
_MAX_NUMBER = 60


async def survey_page(env: MiniWoB, page: str) -> str:
    """The letters of one page's seeds."""
    letters, seen = "", set[str]()
    for seed in range(_MAX_SEEDS[env.form]):
        if len(seen) >= _MAX_TASKS[env.form]:
            break
        conversation, is_success = await _play(env, page, seed)
        first = next(message.content for message in conversation if message.role == "user")
        is_task = is_success and first not in seen and (env.form == "full" or _is_short(conversation))
        if is_task:
            seen.add(first)
        letters += LETTERS[split_of(page, first)] if is_task else "."
    if len(seen) < _MIN_CONTENTS:  # too few to hold any out: the page is for training alone
        letters = re.sub("[^.]", LETTERS["train"], letters)
    return letters.rstrip(".")


def split_of(page: str, content: str) -> Split:
    """The split of a content: one in ten each for validation and test."""
    digit = int.from_bytes(hashlib.blake2b(f"{page}\n{content}".encode(), digest_size=8).digest()) % 10
    return "test" if digit == 9 else "validation" if digit == 8 else "train"


async def _play(env: MiniWoB, page: str, seed: int) -> tuple[list[Message], bool]:
    data = {"page": page, "seed": seed}
    task = Task(id=f"survey/{page}/{seed}", env_id=env.env_id, split="train", seed=seed, data=data)
    observation, _ = await env.areset(options={"task": task})
    conversation = list(observation)
    expert = env.expert()
    while True:
        action = expert.decide(task, conversation).best
        observation, _, terminated, truncated, info = await env.astep(action)
        conversation += [action, *observation]
        if terminated or truncated:
            return conversation, terminated and info["facts"]["success"] == 1.0


def _is_short(conversation: Sequence[Message]) -> bool:
    first = conversation[0].content.split()
    later = [message.content.split() for message in conversation if message.role == "tool"]
    numbers = [int(word) for word in first if word.lstrip("-").isdigit()]
    return (
        len(later) in _CALLS
        and len(first) <= _MAX_FIRST_WORDS
        and all(len(words) <= _MAX_LATER_WORDS for words in later)
        and all(abs(number) <= _MAX_NUMBER or number in _YEARS for number in numbers)
        and max(control.ref for control in read(conversation).controls) <= _MAX_REF
    )


async def _main(chosen: Sequence[str]) -> None:
    forms: tuple[tuple[Form, Sequence[str]], ...] = (("compact", COMPACT_PAGES), ("full", PAGES))
    path = Path(__file__).with_name("tasks.json")
    table = json.loads(path.read_text())
    slots = asyncio.Semaphore(_NUM_PAGES_AT_ONCE)
    async with Resources() as resources, asyncio.TaskGroup() as group:
        surveys = {
            form: {
                page: group.create_task(_survey(form, page, resources, slots))
                for page in chosen or pages
                if page in pages
            }
            for form, pages in forms
        }
    for form, pages in forms:
        done = {page: task.result() for page, task in surveys[form].items()}
        table[form] = {page: done.get(page, table[form].get(page, "")) for page in pages}
    path.write_text(json.dumps(table, indent=1) + "\n")


async def _survey(form: Form, page: str, resources: Resources, slots: asyncio.Semaphore) -> str:
    async with slots:
        env = MiniWoB(form=form, pages=[page], resources=resources)
        letters = await survey_page(env, page)
        await env.aclose()
    counts = " ".join(f"{split} {letters.count(letter)}" for split, letter in LETTERS.items())
    print(f"{form} {page}: {len(letters)} seeds, {counts}", file=sys.stderr, flush=True)
    return letters


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
