"""Where a small model's weights start: random, or with the parts of a copying circuit in place.

What an agent does most is copying: the number that stands after this word. It takes a head that looks at the token
before and, above it, a head that looks for tokens whose predecessor is the wanted word (an induction head,
arXiv:2209.11895). Gradient descent finds the pair late, after a plateau whose length differs by hundreds of steps
between seeds. The copying start spares the search; everything stays trainable.

The residual stream is cut into slots, orthogonal subspaces as wide as a head; `U_s` reads or writes slot s.
- First layer: head 0 looks one token back and head 1 two, whatever the tokens are, and write what slot 0 of that
  token holds to slots 1 and 3. With key bias c and query bias R(-k) c, rotary positions score
  sum_f cos(theta_f (distance - k)), which is largest at distance k.
- Later layers: heads 0 and 1 ask with slot 0 for keys of slot 1 ("whose predecessor is this?") and move the rest of
  what they find; head 2 fetches words to slot 0 by their predecessor; further heads look for equal tokens.
What a head reads is written as itself, so that no translation to the tied output embedding has to be learned (as in
mimetic initialisation, arXiv:2305.09828, whose value-output product has the other sign). The untrained model does not
copy yet: its induction heads favour the right token two or three times over others, and training does the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDING_STD = 0.1
_GAIN = 0.3
_LOOK_BACK_BIAS = 6.0
_LOOK_BACK_CONTENT = 0.1


class _Head(NamedTuple):
    """The slots that a head asks with, is asked by, reads and writes."""

    query: int
    key: int
    value: int
    output: int


_FIRST_LAYER = (_Head(0, 0, 0, 1), _Head(0, 0, 0, 3))
_LATER_LAYERS = (_Head(0, 1, 2, 2), _Head(0, 1, 3, 3), _Head(2, 1, 0, 0))


@torch.no_grad()
def draw_random(model: PreTrainedModel, std: float, generator: Generator) -> None:
    """Matrices normal with `std`, smaller where they write to the residual stream; norms one, biases zero."""
    residual_std = std * (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, residual_std if is_output else std, generator=generator)
        elif name.endswith(".bias"):
            parameter.zero_()


@torch.no_grad()
def place_copying(model: PreTrainedModel, generator: Generator) -> None:
    """The copying start described above, over weights drawn before. Needs query and key biases."""
    config = model.config
    model.get_input_embeddings().weight.normal_(0.0, _EMBEDDING_STD, generator=generator)
    slots = torch.split(_orthogonal(config.hidden_size, generator), config.head_dim)
    decoder = model.get_decoder()
    for number, layer in enumerate(decoder.layers):
        for head, plan in enumerate(_plan(number, config.num_attention_heads, len(slots))):
            _place(layer.self_attn, slice(head * config.head_dim, (head + 1) * config.head_dim), plan, slots)
    for head, distance in enumerate((1, 2)):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        _look_back(decoder.layers[0].self_attn, rows, distance, decoder.rotary_emb.inv_freq)


def _plan(layer: int, num_heads: int, num_slots: int) -> list[_Head]:
    heads = list(_LATER_LAYERS if layer else _FIRST_LAYER)
    for head in range(len(heads), num_heads):
        slot = head % num_slots
        heads.append(_Head(slot, slot, *((0, 0) if layer else (slot, slot))))
    return heads


def _place(attention: torch.nn.Module, rows: slice, plan: _Head, slots: tuple[Tensor, ...]) -> None:
    for name, slot in (("q_proj", plan.query), ("k_proj", plan.key), ("v_proj", plan.value)):
        _weight(attention, name)[rows] = slots[slot]
    _weight(attention, "o_proj")[:, rows] = slots[plan.output].T * _GAIN


def _look_back(attention: torch.nn.Module, rows: slice, distance: int, frequencies: Tensor) -> None:
    for name in ("q_proj", "k_proj"):
        _weight(attention, name)[rows] *= _LOOK_BACK_CONTENT
    # the rotation pairs dimension i with i + head_dim / 2
    angles = -distance * frequencies
    key = torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])
    query = torch.cat([angles.cos(), angles.sin()])
    attention.get_parameter("k_proj.bias")[rows] = key * _LOOK_BACK_BIAS
    attention.get_parameter("q_proj.bias")[rows] = query * _LOOK_BACK_BIAS


def _weight(attention: torch.nn.Module, name: str) -> Tensor:
    return attention.get_parameter(f"{name}.weight")


def _orthogonal(size: int, generator: Generator) -> Tensor:
    square: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return square
