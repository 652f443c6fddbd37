"""Rules about settings: each is met by the job that it is about, and none by a job of defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palaestra.trainer.doctor import Subject, Verdict
from palaestra.trainer.doctor._rules import RULES
from palaestra.trainer.doctor._settings import RULE_MODULES, check_settings, find_hints
from palaestra.trainer.quickstart import QuickstartConfig
from tests.trainer.doctor_jobs import CPU, ECHO, GPU, make_model_folder, make_subject

TRIGGERS: dict[str, dict[str, Any]] = {
    "constant_length_without_its_denominator": {"learner": {"constant_length": 1024}},
    "loss_parameters_that_the_loss_does_not_read": {"learner": {"loss": {"name": "ppo_clip", "tis_cap": 2.0}}},
    "clipping_of_a_ratio_that_is_one": {"mode": "sync", "learner": {"loss": {"clip_high": 0.3}}},
    "warmup_longer_than_training": {"steps": 20, "learner": {"warmup_updates": 20}},
    "more_minibatches_than_rows": {"group_size": 2, "groups_per_step": 2, "learner": {"num_minibatches": 5}},
    "micro_batch_shorter_than_a_conversation": {"learner": {"max_micro_batch_tokens": 1024}},
    "small_groups_that_drop_equal_ones": {"group_size": 2, "drop_zero_variance": True},
    "tolerance_below_rounding": {"canary_tolerance": 0.001, "engine_config": {"dtype": "bfloat16"}},
    "precisions_that_differ": {"engine_config": {"dtype": "bfloat16"}, "learner": {"precision": "float32"}},
    "learner_threads_beyond_the_cores": {"learner": {"threads": 3}},
    "context_longer_than_the_models": {"engine_config": {"max_model_len": 9000}},
    "replies_as_long_as_the_context": {"sampling": {"max_tokens": 4096}},
    "cpu_cache_where_none_is": {"engine": "transformers", "engine_config": {"kv_cache_mb": 1024}},
    "gpu_share_where_none_is": {"engine_config": {"gpu_memory_utilization": 0.5}},
    "seed_of_requests_that_bring_their_own": {"engine_config": {"seed": 1}},
    "more_sequences_than_episodes": {"concurrency": 8, "engine_config": {"max_num_seqs": 64}},
    "engine_threads_beyond_the_cores": {"engine_config": {"threads": 3}},
    "more_episodes_at_once_than_are_in_hand": {"group_size": 2, "groups_per_step": 2, "concurrency": 64},
    "many_more_episodes_than_the_engine_takes": {"engine_config": {"max_num_seqs": 8}},
    "checkpoints_that_are_never_due": {"steps": 20, "save_every": 21},
    "canaries_that_are_never_due": {"steps": 20, "canary_every": 21},
    "lag_longer_than_training": {"steps": 2, "max_lag": 2},
    "failures_that_never_stop_a_run": {"max_failure_rate": 1.0},
    "batches_that_end_before_an_episode": {"step_timeout_s": 4.0},
    "sampling_that_is_nearly_greedy": {"sampling": {"temperature": 0.1}, "learner": {"temperature": 0.1}},
}
"""What of `train` meets each rule on a machine with two cores and no GPU."""

OTHERS = {
    "family_of_a_model_that_has_its_own_format",
    "size_of_a_model_that_is_given",
    "environments_that_are_hardly_drawn",
    "options_that_say_nothing",
    "seeds_that_the_job_replaces",
}
"""Rules about more than `train`, each with a test of its own below."""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make_model_folder(tmp_path / "model")


def hints(subject: Subject) -> set[str]:
    return set(find_hints(subject, CPU))


def test_every_rule_has_a_trigger() -> None:
    assert len(RULE_MODULES) == 3
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
    assert "train.save_every below 200" in finding.remedy


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


def test_environment_that_is_never_drawn(model: str) -> None:
    subject = make_subject(model, weights={ECHO: 1000.0, "test/Leaky-v0": 0.01}, train={"steps": 10})
    assert "environments_that_are_hardly_drawn" in hints(subject)


def test_empty_options(model: str) -> None:
    assert "options_that_say_nothing" in hints(make_subject(model, suite={"options": {ECHO: {}}}))
    assert "options_that_say_nothing" not in hints(make_subject(model, suite={"options": {ECHO: {"fault": ""}}}))


def test_seeds_below_the_main_jobs() -> None:
    subject = Subject.of_quickstart(QuickstartConfig.parse({"rl": {"seed": 3}}))
    assert "seeds_that_the_job_replaces" in hints(subject)


def test_what_the_main_job_sets_by_default_was_not_chosen() -> None:
    subject = Subject.of_quickstart(QuickstartConfig.parse({"rl": {"steps": 3, "engine_config": {"max_num_seqs": 32}}}))
    assert subject.given == {"rl.steps", "rl.engine_config.max_num_seqs"}


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
