"""A model of some ten thousand weights that calls the errand's tools, mostly well, and is never sure of anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from palaestra.agents.renderers import open_renderer
from palaestra.trainer.demonstrations import collect, texts_of, tokenize
from palaestra.trainer.tiny import TinyModelConfig, make_model, make_tokenizer
from tests.chaos.errand import errands

_SIZE = TinyModelConfig(start="random", hidden_size=32, num_layers=2, num_heads=1, ffn_size=64, max_positions=128)
_NUM_SHOWN, _SKILL = 64, 0.5
_NUM_UPDATES, _RATE = 60, 1e-2


def make_walker(folder: Path, size: TinyModelConfig = _SIZE, *, device: str = "cpu", rate: float = _RATE) -> Path:
    """Write the model and its tokenizer to `folder`; a second of imitation spares it nothing but silence.

    Larger models want a smaller learning `rate`, and a torch `device` that is quicker.
    """
    shown = asyncio.run(collect(errands(), _NUM_SHOWN, skill=_SKILL, seed=0))
    make_tokenizer(texts_of(shown), folder, vocab_size=400)
    make_model(folder, size)
    trajectories = tokenize(shown, open_renderer(folder))
    length = max(map(len, trajectories))
    ids_BT = torch.zeros((len(trajectories), length), dtype=torch.long)
    is_said_BT = torch.zeros((len(trajectories), length), dtype=torch.bool)
    for row, trajectory in enumerate(trajectories):
        ids_BT[row, : len(trajectory)] = torch.as_tensor(trajectory.ids.copy(), dtype=torch.long)
        is_said_BT[row, : len(trajectory)] = torch.as_tensor(trajectory.loss_mask.copy())
    _imitate(folder, ids_BT.to(device), is_said_BT.to(device), rate)
    return folder


def _imitate(folder: Path, ids_BT: torch.Tensor, is_said_BT: torch.Tensor, rate: float) -> None:
    disable_progress_bar()
    torch.set_num_threads(1)  # a second one gains nothing here, and on a busy machine costs minutes
    model = AutoModelForCausalLM.from_pretrained(folder).to(ids_BT.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    wanted_N = ids_BT[:, 1:][is_said_BT[:, 1:]]
    for _ in range(_NUM_UPDATES):
        logits_NV = model(input_ids=ids_BT).logits[:, :-1][is_said_BT[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits_NV, wanted_N)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(folder)
