"""Losses and advantages against figures computed from the published formulas, in float64 to 1e-6."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from palaestra.trainer.advantages import advantage_names, estimate_advantages
from palaestra.trainer.losses import (
    LossConfig,
    Tokens,
    geometric_ratio,
    log_linear_proximal,
    loss_names,
    policy_loss,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "losses.json").read_text())
PPO = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
DPPO = {"delta_low": 0.2, "delta_high": 0.2}

ADVANTAGES = {
    "mean_centred": "mean_centred (Dr.GRPO; prime-rl)",
    "sample_std": "sample_std, eps 1e-6 (verl, SkyRL)",
    "sample_std_trl": "sample_std, eps 1e-4 (TRL GRPOTrainer)",
    "population_std": "population_std, eps 1e-8 (TRL AsyncGRPO)",
    "rloo": "rloo",
    "maxrl": "maxrl",
}
LOSSES: list[tuple[str, dict[str, Any]]] = [
    (
        "dppo_tv_kl1e-3 (prime-rl default: delta 0.2, kl_tau 1e-3)",
        {"name": "dppo_tv", **DPPO, "kl_tau": 1e-3},
    ),
    ("dppo_tv (SkyRL, no kl)", {"name": "dppo_tv", **DPPO, "kl_tau": 0.0}),
    ("ppo_clip p vs behaviour (TRL AsyncGRPO, verl bypass)", {"name": "ppo_clip", **PPO}),
    (
        "ppo_clip p vs proximal x token TIS cap 2 (verl decoupled, dual clip 3)",
        {"name": "decoupled_tis", **PPO, "tis_cap": 2.0},
    ),
    ("ppo_clip p vs proximal x sequence TIS cap 2", {"name": "decoupled_sequence_tis", **PPO, "tis_cap": 2.0}),
    (
        "reinforce with detached token TIS cap 2 (verl bypass reinforce)",
        {"name": "reinforce_tis", "tis_cap": 2.0},
    ),
    ("decoupled, token mask upper 5 (AReaL)", {"name": "decoupled_mask", **PPO, "mask_cap": 5.0}),
    (
        "decoupled, token mask upper 1.5, denominator still 5 (AReaL)",
        {"name": "decoupled_mask", **PPO, "mask_cap": 1.5},
    ),
]


def column(name: str) -> Tensor:
    return torch.tensor(VECTORS["tokens"][name], dtype=torch.float64)


@pytest.mark.parametrize(("name", "label"), ADVANTAGES.items())
def test_advantage_equals_the_published_figure(name: str, label: str) -> None:
    advantages = estimate_advantages(name, VECTORS["group_rewards"])
    np.testing.assert_allclose(advantages, VECTORS["advantages"][label], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("label", "values"), LOSSES, ids=[label for label, _ in LOSSES])
def test_loss_equals_the_published_figure(label: str, values: dict[str, Any]) -> None:
    result = policy_loss(
        column("policy_logprobs"),
        column("behaviour_logprobs"),
        column("advantages"),
        torch.ones(5, dtype=torch.bool),
        5.0,
        LossConfig.parse(values),
        proximal_logprobs=column("proximal_logprobs"),
        sequence=torch.tensor(VECTORS["tokens"]["sequence"]),
    )
    assert result.loss.item() == pytest.approx(VECTORS["losses"][label], rel=0, abs=1e-6)


def test_every_published_figure_is_tested() -> None:
    assert set(VECTORS["losses"]) == {label for label, _ in LOSSES}
    assert set(VECTORS["advantages"]) == set(ADVANTAGES.values())
    assert set(ADVANTAGES) <= set(advantage_names())
    # gspo has its ratio below; the plain importance ratio has no published figure
    assert set(loss_names()) >= {values["name"] for _, values in LOSSES} | {"gspo", "importance"}


def test_log_linear_proximal_equals_the_published_figure() -> None:
    proximal = log_linear_proximal(
        column("policy_logprobs"), column("behaviour_logprobs"), torch.full((5,), 3, dtype=torch.int64)
    )
    (expected,) = [v for label, v in VECTORS["aux"].items() if label.startswith("log_linear_proximal")]
    np.testing.assert_allclose(proximal.numpy(), expected, rtol=0, atol=1e-6)


def test_geometric_ratio_equals_the_published_figure() -> None:
    tokens = Tokens(
        policy=column("policy_logprobs"),
        behaviour=column("behaviour_logprobs"),
        proximal=column("proximal_logprobs"),
        advantages=column("advantages"),
        sequence=torch.tensor(VECTORS["tokens"]["sequence"]),
    )
    expected = np.array(VECTORS["aux"]["gspo_geometric_ratio_per_sequence"])[VECTORS["tokens"]["sequence"]]
    np.testing.assert_allclose(geometric_ratio(tokens).numpy(), expected, rtol=0, atol=1e-6)
