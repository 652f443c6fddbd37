"""A batch of sequences that decode together over one left-padded attention cache, and how tokens are drawn.

Invariant: a row's tokens do not depend on its neighbours, beyond rounding: padding is masked, positions
count real tokens only, and each row draws from its own generator.

Shape legend: `B` rows, `T` cached positions (left-padded), `V` vocabulary, `H` heads, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from palaestra.errors import ConfigError


@dataclass(slots=True)
class Row:
    """One sequence in the batch; `token` is sampled but not yet in the cache."""

    number: int
    temperature: float
    top_p: float
    generator: torch.Generator
    token: int = -1


class Drawn(NamedTuple):
    """One sampled token and its log-probability in nats."""

    token: int
    logprob: float


class Batch:
    """Rows with their cache. `extend` adds rows, `step` gives each row one more token, `keep` drops rows."""

    def __init__(self, model: Any) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._cache = self._new_cache()
        self._mask_BT = torch.zeros((0, 0), dtype=torch.long, device=model.device)

    def extend(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> list[Drawn]:
        """Read the prompts of new rows and draw their first tokens."""
        length = max(map(len, prompts))
        device = self._model.device
        ids_BT = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
        mask_BT = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = self._new_cache()
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        logits_BV = self._forward(ids_BT, mask_BT, positions_BT, cache)
        self._merge(cache, mask_BT)
        self.rows += rows
        return _draw(logits_BV, rows)

    def step(self) -> list[Drawn]:
        """Put each row's token into the cache and draw the next."""
        device = self._model.device
        ids_B1 = torch.tensor([[row.token] for row in self.rows], device=device)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(ids_B1)], dim=1)
        positions_B1 = self._mask_BT.sum(-1, keepdim=True) - 1
        return _draw(self._forward(ids_B1, self._mask_BT, positions_B1, self._cache), self.rows)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, and no column that is padding in all of them."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if not indices:
            self._cache = self._new_cache()
            self._mask_BT = self._mask_BT[:0, :0]
            return
        chosen = torch.tensor(indices, device=self._mask_BT.device)
        mask_BT = self._mask_BT[chosen]
        first = int(mask_BT.any(0).int().argmax())
        self._mask_BT = mask_BT[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[chosen, :, first:], layer.values[chosen, :, first:]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ConfigError("the transformers engine serves models with plain attention only; use the engine 'vllm'")
        return cache

    def _merge(self, cache: DynamicCache, mask_BT: Tensor) -> None:
        if not self.rows:
            self._cache, self._mask_BT = cache, mask_BT
            return
        length = max(self._mask_BT.shape[1], mask_BT.shape[1])
        self._mask_BT = torch.cat([_pad_left(mask, length, dim=1) for mask in (self._mask_BT, mask_BT)])
        for mine, new in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_pad_left(keys, length, dim=2) for keys in (mine.keys, new.keys)])
            mine.values = torch.cat([_pad_left(values, length, dim=2) for values in (mine.values, new.values)])


def _pad_left(tensor: Tensor, length: int, *, dim: int) -> Tensor:
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _draw(logits_BV: Tensor, rows: Sequence[Row]) -> list[Drawn]:
    """One token per row; greedy rows (temperature 0) report log-probabilities at temperature 1."""
    heat_B = torch.tensor([row.temperature or 1.0 for row in rows], device=logits_BV.device)
    top_p_B = torch.tensor([row.top_p for row in rows], device=logits_BV.device)
    scaled_BV = logits_BV / heat_B[:, None]
    if bool((top_p_B < 1).any()):
        scaled_BV = _nucleus(scaled_BV, top_p_B)
    logprobs_BV = scaled_BV.log_softmax(-1)
    noise_BV = torch.stack([_noise(row, logprobs_BV.shape[1], logprobs_BV.device) for row in rows])
    tokens_B = (logprobs_BV + noise_BV).argmax(-1)
    chosen_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    return [Drawn(token, logprob) for token, logprob in zip(tokens_B.tolist(), chosen_B.tolist(), strict=True)]


def _noise(row: Row, vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise, with which the arg max is a sample; none for a greedy row."""
    if row.temperature == 0:
        return torch.zeros(vocab_size, device=device)
    return -torch.empty(vocab_size, device=device).exponential_(generator=row.generator).log()


def _nucleus(logits_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Logits with all but the smallest set of most likely tokens of mass `top_p` at minus infinity."""
    sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
    mass_before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
    outside_BV = (mass_before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    outside_BV[:, 0] = False
    return logits_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), -torch.inf)
