"""Run code that nobody vouches for: how it ends, files in and out, a fork, output as it comes, and what holds it.

python examples/sandboxes.py [--backend docker]
"""

from __future__ import annotations

import argparse
import asyncio

from palaestra.errors import ConfigError
from palaestra.sandboxes import Capability, Limits, SandboxPool, SandboxSpec, fork, open_backend


async def play(name: str) -> None:
    spec = SandboxSpec(limits=Limits(wall_s=2.0, memory_mb=256), needs=Capability.isolating())
    async with await open_backend(name, label="example") as backend:
        box = await backend.create(spec)

        # what the code did is a value
        for code in ("print(6 * 7)", "1 / 0", "while True: pass", "print('spam ' * 100_000)"):
            result = await box.run_python(code)
            print(f"{code!r}: {result.ended}, {len(result.stdout)} bytes, {result.cut('stdout') or 'whole'}")

        # files go in and out; a second box starts from the first one's
        await box.put_tree({"data/numbers.txt": b"1\n2\n3\n"})
        twin = await fork(backend, box, spec)
        await twin.write_file("data/numbers.txt", b"none\n")
        result = await box.exec(["sort", "-r", "data/numbers.txt"], on_output=lambda _, piece: print(piece))
        print(result.text("stdout").split(), await twin.read_file("data/numbers.txt"))

        # this needs everything that there is: a back end which lacks some of it here says what, and makes no box
        try:
            async with await backend.create(SandboxSpec(needs=frozenset(Capability))):
                print(f"{name} contains and offers everything here")
        except ConfigError as error:
            print(error)

        # boxes made in advance
        async with SandboxPool(backend, spec, 2) as pool, pool.lease() as ready:
            print((await ready.run_python("import os; print(os.getcwd())")).text("stdout"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="jail", help="jail, docker, podman, or the address of a sandbox server")
    asyncio.run(play(parser.parse_args().backend))


if __name__ == "__main__":
    main()
