"""Training configuration: contradictions and typing errors are refused in one line that helps."""

from __future__ import annotations

import pytest

from palaestra.errors import ConfigError
from palaestra.trainer import GRPOConfig
from palaestra.trainer.quickstart import QuickstartConfig


def test_sync_mode_is_lag_zero() -> None:
    assert GRPOConfig(mode="sync").max_lag == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "sync", "max_lag": 2}, "contradicts max_lag 2"),
        ({"max_lag": 0}, "say mode 'sync'"),
        ({"group_sise": 4}, "did you mean 'group_size'"),
        ({"learner": {"learning_rat": 1.0}}, "unknown key 'learner.learning_rat'; did you mean 'learning_rate'"),
        ({"sampling": {"top_p": 0.9}}, "biases the gradient"),
        ({"sampling": {"temperature": 0.7}}, "differs from learner.temperature"),
        ({"advantage": "mean_centered"}, "did you mean 'mean_centred'"),
        ({"group_size": 1}, "group_size"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig.parse(values)


def test_unclipped_loss_needs_sync() -> None:
    from palaestra.trainer.losses import is_clipped, loss_names

    unclipped = [name for name in loss_names() if not is_clipped(name)]
    assert unclipped, "the library has at least one unclipped loss"
    with pytest.raises(ConfigError, match="unclipped ratio"):
        GRPOConfig.parse({"learner": {"loss": {"name": unclipped[0]}}})
    assert GRPOConfig.parse({"mode": "sync", "learner": {"loss": {"name": unclipped[0]}}}).max_lag == 0


def test_defaults_have_room_for_the_full_form() -> None:
    config = GRPOConfig()
    assert (config.sampling.max_tokens, config.engine_config.max_model_len) == (512, 4096)
    small = QuickstartConfig().rl
    assert (small.sampling.max_tokens, small.engine_config.max_model_len, small.engine_config.kv_cache_mb) == (
        32,
        512,
        256,
    )


def test_the_family_of_the_main_job_reaches_its_trainer() -> None:
    assert QuickstartConfig(family="qwen3").seeded_rl.family == "qwen3"
    assert QuickstartConfig.parse({"rl": {"family": "glm-5"}}).seeded_rl.family == "glm-5"
