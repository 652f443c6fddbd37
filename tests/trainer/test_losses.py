"""Losses: masks, gradients by hand, metrics by hand, configuration."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from palaestra.errors import ConfigError
from palaestra.trainer.losses import LossConfig, LossResult, find_loss, is_clipped, loss_names, policy_loss


def run(
    name: str,
    policy: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    denominator: float | Tensor = 1.0,
    **parameters: Any,
) -> LossResult:
    is_needed = find_loss(name).needs_proximal
    return policy_loss(
        policy,
        behaviour,
        advantages,
        torch.ones_like(policy, dtype=torch.bool) if mask is None else mask,
        denominator,
        LossConfig(name=name, **parameters),
        proximal_logprobs=policy.detach() if is_needed else None,
    )


def double(*values: float, is_trained: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=is_trained)


@pytest.mark.parametrize("name", loss_names())
def test_masked_positions_reach_neither_loss_nor_gradient_nor_metrics(name: str) -> None:
    mask = torch.tensor([True, False, True])
    plain = double(-0.5, -0.7, is_trained=True)
    padded = double(-0.5, -math.inf, -0.7, is_trained=True)
    expected = run(name, plain, double(-0.6, -0.6), double(1.0, -2.0), denominator=2.0)
    result = run(name, padded, double(-0.6, -math.inf, -0.6), double(1.0, math.nan, -2.0), mask, 2.0)
    expected.loss.backward()  # type: ignore[no-untyped-call]
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert plain.grad is not None
    assert padded.grad is not None
    assert result.loss.item() == expected.loss.item()
    assert result.metrics == expected.metrics
    assert padded.grad[mask].tolist() == plain.grad.tolist()
    assert float(padded.grad[1]) == 0.0


@pytest.mark.parametrize("name", loss_names())
def test_on_policy_gradient_is_minus_advantage_over_denominator(name: str) -> None:
    policy = double(-0.5, -1.5, is_trained=True)
    # per-sequence ratios share one row here, so equal advantages keep the expected gradient the same for all losses
    run(name, policy, policy.detach(), double(3.0, 3.0), denominator=4.0).loss.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.75, -0.75])


@pytest.mark.parametrize("name", loss_names())
def test_extreme_ratio_has_finite_loss_and_gradient(name: str) -> None:
    policy = torch.tensor([-0.1, -500.0, -0.1], requires_grad=True)
    behaviour = torch.tensor([-500.0, -0.1, -500.0])
    result = run(name, policy, behaviour, torch.tensor([1.0, -1.0, -1.0]))
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert math.isfinite(result.loss.item())
    assert bool(policy.grad.isfinite().all())


@pytest.mark.parametrize("name", loss_names())
def test_no_sampled_token_has_loss_zero(name: str) -> None:
    policy = double(-math.inf, is_trained=True)
    result = run(name, policy, double(-1.0), double(1.0), torch.tensor([False]), 7.0)
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert result.loss.item() == 0.0
    assert result.metrics == {}


def test_ppo_clips_each_side_by_its_own_bound() -> None:
    ratios = double(1.5, 0.5, 1.5, 0.5)
    policy = ratios.log().requires_grad_()
    result = run("ppo_clip", policy, double(0, 0, 0, 0), double(1.0, -1.0, -1.0, 1.0), clip_low=0.2, clip_high=0.28)
    result.loss.backward()  # type: ignore[no-untyped-call]
    # clipped at 1.28 and 0.8; the other two move back into the region, so they keep ratio and gradient
    assert result.loss.item() == pytest.approx(-1.28 + 0.8 + 1.5 - 0.5)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([0.0, 0.0, 1.5, -0.5])
    assert result.metrics["clip_fraction"] == 0.5


def test_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    policy = double(math.log(10.0), is_trained=True)
    result = run("ppo_clip", policy, double(0.0), double(-2.0), dual_clip=3.0)
    assert result.loss.item() == pytest.approx(6.0)
    assert run("ppo_clip", policy, double(0.0), double(-2.0), dual_clip=math.inf).loss.item() == pytest.approx(20.0)


def test_dual_clip_off_keeps_a_zero_advantage_finite() -> None:
    policy = double(-0.5, is_trained=True)
    result = run("ppo_clip", policy, double(-0.6), double(0.0), dual_clip=math.inf)
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert result.loss.item() == 0.0
    assert policy.grad is not None
    assert float(policy.grad) == 0.0


def test_dppo_keeps_its_quadratic_term_on_dropped_tokens() -> None:
    policy = double(math.log(0.9), is_trained=True)
    result = run("dppo_tv", policy, double(math.log(0.3)), double(1.0), kl_tau=0.5)
    assert result.loss.item() == pytest.approx(0.5 * math.log(3.0) ** 2)
    assert result.metrics["clip_fraction"] == 1.0


def test_denominator_may_differ_for_each_token() -> None:
    policy = double(-1.0, -1.0, -1.0)
    mask = torch.tensor([True, False, True])
    result = run("importance", policy, policy, double(1.0, 1.0, 1.0), mask, double(2.0, 1.0, 4.0))
    assert result.loss.item() == pytest.approx(-0.75)


def test_metrics_by_hand() -> None:
    metrics = run("importance", double(-1.0, -2.0), double(-1.0, -1.5), double(1.0, 1.0)).metrics
    ratio = math.exp(-0.5)
    assert metrics == pytest.approx(
        {
            "clip_fraction": 0.0,
            "ratio": (1 + ratio) / 2,
            "kl": (ratio - 1 + 0.5) / 2,
            "entropy": 1.5,
            "max_abs_log_ratio": 0.5,
        }
    )


def test_only_the_importance_loss_is_unclipped() -> None:
    assert [name for name in loss_names() if not is_clipped(name)] == ["importance"]
    with pytest.raises(ConfigError, match="did you mean 'ppo_clip'"):
        is_clipped("ppo_clp")


def test_missing_proximal_is_refused() -> None:
    one = double(-1.0)
    with pytest.raises(ValueError, match="needs proximal"):
        policy_loss(one, one, one, torch.tensor([True]), 1.0, LossConfig(name="decoupled_tis"))


def test_configuration_refuses_unknown_names_and_idle_parameters() -> None:
    with pytest.raises(ConfigError, match="unknown loss 'dppo'; did you mean 'dppo_tv'"):
        LossConfig.parse({"name": "dppo"})
    with pytest.raises(ConfigError, match="'ppo_clip' does not read tis_cap; it reads clip_high, clip_low, dual_clip"):
        LossConfig.parse({"name": "ppo_clip", "tis_cap": 4.0})
    with pytest.raises(ValidationError, match="dual_clip"):
        LossConfig(dual_clip=1.0)


@pytest.mark.parametrize("name", loss_names())
def test_resolved_configuration_loads_again(name: str) -> None:
    config = LossConfig(name=name)
    assert LossConfig.parse(config.model_dump()) == config


def test_configuration_loads_without_torch() -> None:
    code = "import sys, palaestra.trainer.losses, palaestra.trainer.advantages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
