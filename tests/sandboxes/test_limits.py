"""Limits: what can never be given is refused by name when a spec is made, and what is accepted can be given."""

from __future__ import annotations

import math

import pytest

from palaestra.config import Config
from palaestra.errors import ConfigError
from palaestra.sandboxes import Limits, SandboxBackend, SandboxSpec
from palaestra.sandboxes.server import serve
from palaestra.trainer.losses import LossConfig


@pytest.mark.parametrize("field", ["wall_s", "cpu_s", "lifetime_s"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, -1.0, 1e300])
def test_a_time_is_a_number_of_seconds_that_can_pass(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Limits.parse({field: value})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"memory_mb": 31, "workspace_mb": 8}, "memory_mb"),
        ({"memory_mb": (1 << 22) + 1}, "memory_mb"),
        ({"workspace_mb": 512}, r"workspace_mb = 512 must be below memory_mb = 512: .*three writable places"),
        ({"processes": 32_769}, "processes"),
        ({"open_files": 65_537}, "open_files"),
        ({"open_files": 15}, "open_files"),
        ({"output_kb": 32_769, "memory_mb": 4096}, "output_kb"),
        ({"output_kb": 8193, "memory_mb": 64, "workspace_mb": 8}, r"output_kb = 8193 .* at most 8192"),
        ({"file_mb": 65}, r"file_mb = 65 is more than workspace_mb = 64"),
        ({"wall_s": 3600.0}, r"wall_s = 3600 must be below lifetime_s"),
        ({"lifetime_s": 24 * 86_400 + 1}, "lifetime_s"),
    ],
)
def test_a_limit_that_can_never_be_given_is_refused_by_name(values: dict[str, float], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Limits.parse(values)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(memory_mb=32, workspace_mb=8, output_kb=4096),
        Limits(processes=1 << 15, open_files=4096, lifetime_s=24 * 86_400),
        Limits(open_files=16),
    ],
)
async def test_the_extremes_that_are_accepted_can_be_given(backend: SandboxBackend, limits: Limits) -> None:
    async with await backend.create(SandboxSpec(limits=limits)) as box:
        assert (await box.run_python("print(6 * 7)")).stdout == b"42\n"
        assert (await box.exec(["sh", "-c", "echo 42"])).stdout == b"42\n"


async def test_the_most_output_that_may_be_kept_is_kept(backend: SandboxBackend) -> None:
    limits = Limits(output_kb=1 << 15, memory_mb=512, wall_s=60.0, cpu_s=60.0)
    code = "import os\nfor fd in (1, 2):\n    for _ in range(32): os.write(fd, b'x' * (1 << 20))"
    async with await backend.create(SandboxSpec(limits=limits)) as box:
        result = await box.run_python(code)
        assert result.ended == "exit", result.ended
        assert result.stdout == result.stderr == b"x" * (32 << 20)


def test_no_configuration_has_an_infinity_but_where_it_means_off() -> None:
    class Made(Config):
        ratio: float

    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ConfigError, match="ratio"):
            Made.parse({"ratio": value})
    assert LossConfig.parse({"dual_clip": math.inf}).dual_clip == math.inf
    with pytest.raises(ConfigError, match="dual_clip"):
        LossConfig.parse({"dual_clip": math.nan})


@pytest.mark.parametrize("lease_s", [math.nan, math.inf, -1.0, 0.0, 0.5])
def test_a_servers_lease_is_a_time_that_can_pass(lease_s: float) -> None:
    with pytest.raises(ConfigError, match=r"lease_s must be within 1 and 86400 seconds"):
        serve(lease_s=lease_s, token="")
