"""The child of the supervised stage: TRL's `SFTTrainer` on ready-made tokens, with our order, probe and limits.

Invariants: a label is a token id where the loss mask is true and -100 elsewhere; batches hold similarly long
sequences in an order that depends on the seed alone; nothing is written but progress lines and the final model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
import trl
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from palaestra.errors import ConfigError
from palaestra.processes import Reply
from palaestra.trainer._learner_files import copy_companions
from palaestra.trainer._policy_model import local_folder
from palaestra.trainer._sft_gate import ProbeGate
from palaestra.trainer.sft import SFTJob, SFTResult
from palaestra.types import Trajectory

IGNORED = -100
_BATCHES_SORTED_TOGETHER = 4  # more would save padding, but make batches of one kind of task
_LOG_EVERY = 25

Row: TypeAlias = dict[str, list[int]]


def build(job: SFTJob) -> SFTService:
    """The service of one job."""
    return SFTService(job)


class SFTService:
    """Answers one call, `train`."""

    def __init__(self, job: SFTJob) -> None:
        self._job = job

    def handle(self, method: str, args: tuple[Any, ...], reply: Reply) -> None:
        """Train to the end, then answer with the result."""
        if method != "train":
            raise ValueError(f"the sft worker has no method {method!r}")
        reply.send(train(self._job))

    def work(self) -> bool:
        """Nothing happens between calls."""
        return False

    def close(self) -> None:
        """Nothing to release."""


def train(job: SFTJob) -> SFTResult:
    """Run the job in this process and save the model with its tokenizer."""
    trainer = make_trainer(job)
    gate = ProbeGate(job)
    trainer.add_callback(gate)
    trainer.train()
    trainer.model.save_pretrained(job.output)
    copy_companions(local_folder(str(job.model)), job.output)
    return gate.result()


def make_trainer(job: SFTJob) -> ReplyTrainer:
    """The trainer of a job; raises `ConfigError` when the model does not load."""
    torch.set_num_threads(job.config.threads)
    set_seed(job.config.seed)
    try:
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(job.model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load {job.model}: {error}") from error
    return ReplyTrainer(
        model=model,
        args=_arguments(job),
        train_dataset=datasets.Dataset.from_list([to_row(trajectory) for trajectory in job.train]),
        processing_class=tokenizer,
    )


def to_row(trajectory: Trajectory) -> Row:
    """A trajectory as `SFTTrainer` takes it when its own preparation is switched off."""
    labels = np.where(trajectory.loss_mask, trajectory.ids, IGNORED)
    return {"input_ids": trajectory.ids.tolist(), "labels": labels.tolist()}


def _arguments(job: SFTJob) -> trl.SFTConfig:
    config = job.config
    return trl.SFTConfig(
        output_dir=str(job.output),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine" if config.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=config.warmup_steps,
        adam_beta2=config.beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=_LOG_EVERY,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
    )


class ReplyTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with our order of the demonstrations, and the loss computed on reply tokens only."""

    def _get_train_sampler(self, train_dataset: object = None) -> torch.utils.data.Sampler[int]:
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return LengthBatches(lengths, self.args.train_batch_size, seed=self.args.seed)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the reply tokens.

        TRL's own loss also computes entropy and accuracy over all positions and the head twice: a third of the
        time of a small model's step, for numbers that nobody reads.
        """
        labels = inputs["labels"][:, 1:]
        hidden = model.get_decoder()(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state[:, :-1]
        is_reply = labels != IGNORED
        logits = model.get_output_embeddings()(hidden[is_reply])
        num_tokens = is_reply.sum() if num_items_in_batch is None else num_items_in_batch
        return functional.cross_entropy(logits.float(), labels[is_reply], reduction="sum") / num_tokens


class LengthBatches(torch.utils.data.Sampler[int]):
    """Indices such that each `batch_size` in a row are similarly long; a new order in every pass."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._rng = np.random.default_rng([seed, 2])

    def __len__(self) -> int:
        return len(self._lengths) // self._batch_size * self._batch_size

    def __iter__(self) -> Iterator[int]:
        """The indices of one pass; what does not fill a batch waits for another pass."""
        order = self._rng.permutation(len(self._lengths))[: len(self)]
        window = self._batch_size * _BATCHES_SORTED_TOGETHER
        windows = [order[start : start + window] for start in range(0, len(order), window)]
        by_length = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in windows])
        batches = by_length.reshape(-1, self._batch_size)
        return iter(self._rng.permutation(batches).ravel().tolist())
