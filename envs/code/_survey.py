"""Finds out which bugs are bugs, by running every one of them in a sandbox, and writes `mutants.json`.

`python -m palaestra.envs.code._survey` after any change of the functions or the mutations. A mutation is kept when
it fails visible and hidden tests without running into a limit, so that an unrepaired function costs little.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from palaestra.envs.code._algorithms import Algorithm
from palaestra.envs.code._full_tasks import ALGORITHMS, MUTANTS_PATH, combinations_of
from palaestra.envs.code._mutations import mutate, mutation_names
from palaestra.envs.code._splits import split_of
from palaestra.envs.code._workspace import Workspace
from palaestra.resources import Resources
from palaestra.sandboxes import Ended

_WALL_S = 0.5


async def fails_its_tests(workspace: Workspace, chosen: Algorithm, bugs: Iterable[str]) -> bool:
    """Whether the function with these bugs fails visible and hidden tests, and within half a second."""
    source = mutate(chosen.source, list(bugs))
    for tests in chosen.tests:
        result = await workspace.grade(source, tests, wall_s=_WALL_S)
        if result.is_passed or result.ended is not Ended.EXIT:
            return False
    return True


async def survey(chosen: Algorithm, workspace: Workspace) -> dict[str, Any]:
    """The function's entry of `mutants.json`."""
    names = mutation_names(chosen.source)
    bugs = [name for name in names if await fails_its_tests(workspace, chosen, [name])]
    pairs = [pair for pair in combinations_of(bugs, 2) if len({split_of(f"{chosen.name} {bug}") for bug in pair}) == 1]
    cancelling = [list(pair) for pair in pairs if not await fails_its_tests(workspace, chosen, pair)]
    print(f"{chosen.name}: {len(bugs)} of {len(names)} mutations, {len(cancelling)} of {len(pairs)} pairs cancel")
    return {"bugs": bugs, "cancelling": cancelling}


async def main() -> None:
    """Survey every function and write the table."""
    async with Resources() as resources:
        workspace = Workspace(resources, "jail", 1, {})
        try:
            table = {name: await survey(chosen, workspace) for name, chosen in sorted(ALGORITHMS.items())}
        finally:
            await workspace.aclose()
    MUTANTS_PATH.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
