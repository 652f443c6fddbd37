"""Rules about settings: each is met by the job that it is about, and none by a job of defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from palaestra.trainer.doctor import Subject, Verdict
from palaestra.trainer.doctor._rules import RULES, check_settings, find_hints
from palaestra.trainer.quickstart import QuickstartConfig
from tests.trainer.doctor_jobs import CPU, ECHO, GPU, make_model_folder, make_subject

TRIGGERS: dict[str, dict[str, Any]] = {
    "constant_length_without_its_denominator": {"learner": {"constant_length": 1024}},
    "loss_parameters_that_the_loss_does_not_read": {"learner": {"loss": {"name": "ppo_clip", "tis_cap": 2.0}}},
    "clipping_of_a_ratio_that_is_one": {"mode": "sync", "learner": {"loss": {"clip_high": 0.3}}},
    "warmup_longer_than_training": {"steps": 20, "learner": {"warmup_updates": 21}},
    "more_minibatches_than_rows": {"group_size": 2, "groups_per_step": 2, "learner": {"num_minibatches": 5}},
    "tolerance_below_rounding": {"canary_tolerance": 0.001, "engine_config": {"dtype": "bfloat16"}},
    "context_longer_than_the_models": {"engine_config": {"max_model_len": 9000}},
    "cpu_cache_where_none_is": {"engine": "transformers", "engine_config": {"kv_cache_mb": 1024}},
    "gpu_share_where_none_is": {"engine_config": {"gpu_memory_utilization": 0.5}},
    "seed_of_requests_that_bring_their_own": {"engine_config": {"seed": 1}},
    "more_episodes_at_once_than_are_in_hand": {"group_size": 2, "groups_per_step": 2, "concurrency": 64},
    "checkpoints_that_are_never_due": {"steps": 20, "save_every": 21},
    "canaries_that_are_never_due": {"steps": 20, "canary_every": 21},
    "failures_that_never_stop_a_run": {"max_failure_rate": 1.0},
    "episodes_without_advantage_that_never_stop_a_run": {"max_invalid_rate": 1.0},
    "stalls_that_are_never_told": {"step_timeout_s": 600.0, "stall_report_s": 600.0},
    "learner_seed_that_deals_nothing": {"learner": {"seed": 3}},
    "batches_that_end_before_an_episode": {"step_timeout_s": 4.0},
    "groups_that_end_before_an_episode": {"step_timeout_s": 60.0, "group_timeout_s": 4.0, "stall_report_s": 20.0},
    "more_requests_than_episodes": {"concurrency": 8, "engine_config": {"max_num_seqs": 500}},
    "replies_longer_than_the_context": {"sampling": {"max_tokens": 100_000}},
    "lag_beyond_training": {"steps": 3, "max_lag": 50},
    "steps_larger_than_weights": {"learner": {"learning_rate": 100.0}},
}
"""What of `train` meets each rule on a machine with two cores and no GPU."""

OTHERS = {
    "family_of_a_model_that_has_its_own_format",
    "size_of_a_model_that_is_given",
    "seeds_that_the_job_replaces",
}
"""Rules about more than `train`, each with a test of its own below."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make_model_folder(tmp_path / "model")


def hints(subject: Subject) -> set[str]:
    return set(find_hints(subject, CPU))


def test_every_rule_has_a_trigger() -> None:
    assert {rule.__name__ for rule in RULES} == TRIGGERS.keys() | OTHERS


@pytest.mark.parametrize("name", TRIGGERS)
def test_rule_is_met(name: str, model: str) -> None:
    subject = make_subject(model, train=TRIGGERS[name])
    found = find_hints(subject, CPU)
    assert name in found
    assert found[name].remedy
    assert "\n" not in found[name].detail


def test_defaults_meet_no_rule(model: str) -> None:
    for machine in (CPU, GPU):
        assert find_hints(make_subject(model), machine) == {}
        assert find_hints(Subject.of_quickstart(QuickstartConfig()), machine) == {}
    finding = check_settings(make_subject(model), CPU)
    assert finding.verdict is Verdict.OK
    assert str(len(RULES)) in finding.detail


def test_settings_that_work_together_meet_no_rule(model: str) -> None:
    learner = {"denominator": "constant", "constant_length": 512, "warmup_updates": 5, "num_minibatches": 2}
    subject = make_subject(model, train={"learner": learner, "engine_config": {"kv_cache_mb": 512}, "save_every": 5})
    assert hints(subject) == set()


def test_warnings_are_told_together_with_their_remedies(model: str) -> None:
    subject = make_subject(model, train={"max_failure_rate": 1.0, "save_every": 900})
    finding = check_settings(subject, CPU)
    assert finding.verdict is Verdict.WARNING
    assert "max_failure_rate 1" in finding.detail
    assert "save_every 900" in finding.detail
    assert "train.save_every to at most 200" in finding.remedy


def test_remedies_can_be_followed(model: str) -> None:
    train = {"steps": 1, "save_every": 2, "canary_every": 2, "learner": {"warmup_updates": 2}}
    remedies = {hint.remedy for hint in find_hints(make_subject(model, train=train), CPU).values()}
    assert remedies == {
        "set train.save_every to at most 1",
        "set train.canary_every to at most 1",
        "leave train.learner.warmup_updates out",
    }
    followed = {"steps": 1, "save_every": 1, "canary_every": 1}
    assert hints(make_subject(model, train=followed)) == set()


def test_warmup_that_ends_with_the_last_update_arrives(model: str) -> None:
    assert hints(make_subject(model, train={"steps": 20, "learner": {"warmup_updates": 20}})) == set()


def test_half_of_a_short_step_timeout_cuts_groups_too(model: str) -> None:
    found = hints(make_subject(model, train={"step_timeout_s": 8.0, "stall_report_s": 4.0}))
    assert found == {"groups_that_end_before_an_episode"}, "an episode may take 5 s"


def test_family_of_a_model_of_ours_is_idle(tmp_path: Path, model: str) -> None:
    name = "family_of_a_model_that_has_its_own_format"
    ours = make_model_folder(tmp_path / "ours", is_ours=True)
    assert name in hints(make_subject(ours, train={"family": "qwen3"}))
    assert name not in hints(make_subject(model, train={"family": "qwen3"}))
    assert name in hints(Subject.of_quickstart(QuickstartConfig.parse({"family": "qwen3"})))


def test_size_of_a_new_model_is_idle_where_one_is_given(model: str) -> None:
    name = "size_of_a_model_that_is_given"
    values = {"model": model, "tiny": {"num_layers": 4}}
    assert name in hints(Subject.of_quickstart(QuickstartConfig.parse(values)))
    assert name not in hints(Subject.of_quickstart(QuickstartConfig.parse({"tiny": {"num_layers": 4}})))


def test_seeds_below_the_main_jobs() -> None:
    subject = Subject.of_quickstart(QuickstartConfig.parse({"rl": {"seed": 3}}))
    assert "seeds_that_the_job_replaces" in hints(subject)


def test_what_the_main_job_sets_by_default_was_not_chosen() -> None:
    subject = Subject.of_quickstart(QuickstartConfig.parse({"rl": {"steps": 3, "engine_config": {"max_num_seqs": 32}}}))
    assert subject.given == {"rl.steps", "rl.engine_config.max_num_seqs"}


def test_no_hub_is_asked_about_a_model_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: object) -> str:
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    folder = make_subject("small", train={"engine_config": {"max_model_len": 512}})
    assert folder.context == 512
    gone = replace(make_subject("nobody/nothing", train={"engine_config": {"max_model_len": 512}}), is_there=False)
    assert gone.context == 512
    assert hints(gone) == set()


def test_what_others_derive_was_not_chosen(model: str) -> None:
    subject = make_subject(model, train={"mode": "one-step", "step_timeout_s": 900.0})
    assert {key for key in subject.given if key.startswith("train.")} == {"train.mode", "train.step_timeout_s"}
    both = make_subject(model, train={"mode": "async", "max_lag": 2, "step_timeout_s": 900.0, "group_timeout_s": 400.0})
    assert both.given >= {"train.max_lag", "train.group_timeout_s"}


def test_episodes_in_hand_are_counted_as_the_loop_issues_them(model: str) -> None:
    name = "more_episodes_at_once_than_are_in_hand"
    train = {"group_size": 2, "num_spare": 1, "groups_per_step": 2, "max_lag": 1}
    assert name not in hints(make_subject(model, train={**train, "concurrency": 12}))
    found = find_hints(make_subject(model, train={**train, "concurrency": 13}), CPU)
    assert "at most 12 episodes are in hand (2 groups of 3, 2 times)" in found[name].detail


def test_a_seed_that_deals_minibatches_is_no_idle_one(model: str) -> None:
    assert hints(make_subject(model, train={"learner": {"seed": 3, "num_minibatches": 2}})) == set()


def test_of_a_resolved_job_only_changed_keys_were_chosen(model: str) -> None:
    from palaestra.trainer.job import Job

    job = Job.parse({"model": model, "suite": {"weights": {ECHO: 1.0}}, "train": {"steps": 3}})
    again = Job.parse(job.model_dump(mode="json", exclude={"run"}))
    assert Subject.of_job(again, is_resolved=True).given >= {"model", "suite.weights", "train.steps"}
    assert not {key for key in Subject.of_job(again, is_resolved=True).given if key.startswith("train.learner")}


def test_gpu_and_cpu_settings_change_places_on_a_gpu(model: str) -> None:
    cpu = make_subject(model, train={"engine_config": {"kv_cache_mb": 512}})
    gpu = make_subject(model, train={"engine_config": {"gpu_memory_utilization": 0.4}})
    assert set(find_hints(cpu, GPU)) == {"cpu_cache_where_none_is"}
    assert set(find_hints(gpu, GPU)) == set()
    assert hints(cpu) == set()
