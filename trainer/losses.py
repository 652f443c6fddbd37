"""Policy-gradient losses: small pure functions over the sampled tokens of a micro-batch, one registry.

Invariants: the mask is applied first, so nothing outside it can reach a number; the denominator is given by the
caller and never depends on what a loss drops. torch is not imported here: a run's configuration loads without it.

Shape legend: `N` sampled tokens after masking. `p` policy (the only one with a gradient), `q` proximal, `b` behaviour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pydantic import Field, model_validator

from palaestra.config import Config, nearest
from palaestra.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_LOG_RATIO = 20.0  # exp overflows float32 at 88, and inf times a zero gradient is nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a loss reads, shape (N,) each; log-probs in nats, `sequence` the int64 number of the token's row."""

    policy: Tensor
    behaviour: Tensor
    proximal: Tensor
    advantages: Tensor
    sequence: Tensor


class TokenLoss(NamedTuple):
    """Loss of every token and whether the trust region held it back, shape (N,) each."""

    loss: Tensor
    is_clipped: Tensor


class LossResult(NamedTuple):
    """Scalar loss, and plain averages over the sampled tokens (maxima where the name starts with `max_`)."""

    loss: Tensor
    metrics: dict[str, float]


TokenLossFunction: TypeAlias = "Callable[[Tokens, LossConfig], TokenLoss]"


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A registered loss. `uses` names the fields of `LossConfig` that it reads."""

    function: TokenLossFunction
    uses: frozenset[str]
    is_clipped: bool
    needs_proximal: bool


_LOSSES: dict[str, LossSpec] = {}


def token_loss(
    name: str, *, uses: tuple[str, ...] = (), is_clipped: bool = True, needs_proximal: bool = False
) -> Callable[[TokenLossFunction], TokenLossFunction]:
    """Decorator that registers a loss; raises `ConfigError` when the name is taken."""

    def register(function: TokenLossFunction) -> TokenLossFunction:
        if name in _LOSSES:
            raise ConfigError(f"loss {name!r} is registered twice; choose another name")
        _LOSSES[name] = LossSpec(function, frozenset(uses), is_clipped, needs_proximal)
        return function

    return register


def loss_names() -> list[str]:
    """Names of all registered losses, sorted."""
    return sorted(_LOSSES)


def find_loss(name: str) -> LossSpec:
    """The loss called `name`; raises `ConfigError` with the nearest valid name."""
    if name not in _LOSSES:
        raise ConfigError(f"unknown loss {name!r}{nearest(name, loss_names())}")
    return _LOSSES[name]


def is_clipped(name: str) -> bool:
    """True when the loss bounds its importance ratio, which training with `max_lag > 0` requires."""
    return find_loss(name).is_clipped


class LossConfig(Config):
    """Which loss, and its parameters. A parameter that the chosen loss does not read is refused."""

    name: str = "ppo_clip"
    """One of `loss_names()`."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio is clipped below at `1 - clip_low`."""
    clip_high: float = Field(default=0.28, gt=0)
    """The ratio is clipped above at `1 + clip_high`."""
    dual_clip: float = Field(default=3.0, gt=1, allow_inf_nan=True)
    """Upper bound of a token's loss in units of a negative advantage; `inf` switches it off."""
    delta_low: float = Field(default=0.2, gt=0, le=1)
    """Probability that a token with a negative advantage may lose before it is dropped."""
    delta_high: float = Field(default=0.2, gt=0, le=1)
    """Probability that a token with a positive advantage may gain before it is dropped."""
    kl_tau: float = Field(default=1e-3, ge=0)
    """Weight of the squared log-ratio to the behaviour policy."""
    tis_cap: float = Field(default=2.0, gt=0)
    """Upper bound of the truncated importance weight."""
    mask_cap: float = Field(default=5.0, gt=0)
    """Tokens whose importance weight is above this are dropped."""
    proximal: Literal["recompute", "log_linear"] = "recompute"
    """Where proximal log-probs come from: the weights before the step's first update, or `log_linear_proximal`."""

    @model_validator(mode="after")
    def _only_used_fields(self) -> LossConfig:
        if self.name not in _LOSSES:
            raise ValueError(f"unknown loss {self.name!r}{nearest(self.name, loss_names())}")
        fields = type(self).model_fields
        uses = _LOSSES[self.name].uses
        # a resolved configuration lists every field, so only a changed value shows that someone expects an effect
        idle = [n for n in fields if n != "name" and n not in uses and getattr(self, n) != fields[n].default]
        if idle:
            raise ValueError(f"loss {self.name!r} does not read {', '.join(idle)}; it reads {', '.join(sorted(uses))}")
        return self


def policy_loss(
    policy_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float | Tensor,
    config: LossConfig,
    *,
    proximal_logprobs: Tensor | None = None,
    sequence: Tensor | None = None,
) -> LossResult:
    """Sum over masked-in tokens of token loss / denominator, and metrics; all tensors have one shape.

    `denominator` is a number or one for each token, and is used as it is. `sequence` numbers the row of each token,
    for the losses with a weight per sequence; None means one row for all. Raises `ValueError` when the loss needs
    proximal log-probs and none are given.
    """
    spec = find_loss(config.name)
    if spec.needs_proximal and proximal_logprobs is None:
        raise ValueError(f"loss {config.name!r} needs proximal log-probs")
    # mask first: a log-prob may be -inf on padding, and 0 * -inf is nan
    policy_N, behaviour_N = policy_logprobs[mask], behaviour_logprobs[mask]
    tokens = Tokens(
        policy=policy_N,
        behaviour=behaviour_N,
        proximal=policy_N.detach() if proximal_logprobs is None else proximal_logprobs[mask],
        advantages=advantages[mask],
        sequence=policy_N.new_zeros(policy_N.shape).long() if sequence is None else sequence[mask],
    )
    token = spec.function(tokens, config)
    divisor = denominator if isinstance(denominator, (int, float)) else denominator[mask]
    return LossResult((token.loss / divisor).sum(), _metrics(tokens, token.is_clipped))


def log_linear_proximal(policy_logprobs: Tensor, behaviour_logprobs: Tensor, lag: Tensor) -> Tensor:
    """Proximal log-probs without a forward pass: `log q = a log b + (1 - a) log p`, `a = 1 / lag`, 0 at lag 0.

    `lag` in policy versions, per token. Staleness-aware interpolation of A-3PO, arXiv:2512.06547. No gradient.
    """
    alpha = (1.0 / lag.clamp(min=1).to(policy_logprobs.dtype)) * (lag > 0)
    return alpha * behaviour_logprobs + (1.0 - alpha) * policy_logprobs.detach()


@token_loss("importance", is_clipped=False)
def importance(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`-A p/b`: the unbiased policy gradient, with unbounded variance off policy."""
    ratio_N = _ratio(tokens.policy, tokens.behaviour)
    return TokenLoss(-tokens.advantages * ratio_N, ratio_N.new_zeros(ratio_N.shape).bool())


@token_loss("reinforce_tis", uses=("tis_cap",))
def reinforce_tis(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`-A min(p/b, cap) log p` with the weight detached: REINFORCE with truncated importance sampling.

    CISPO, arXiv:2506.13585 eq. 4, without its lower bound; verl calls it bypass mode.
    """
    ratio_N = _ratio(tokens.policy, tokens.behaviour).detach()
    return TokenLoss(-tokens.advantages * ratio_N.clamp(max=config.tis_cap) * tokens.policy, ratio_N > config.tis_cap)


@token_loss("ppo_clip", uses=("clip_low", "clip_high", "dual_clip"))
def ppo_clip(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`max(-A r, -A clip(r, 1 - low, 1 + high))`, `r = p/b`, at most `-A dual_clip` where A < 0.

    PPO, arXiv:1707.06347 eq. 7; asymmetric bounds of DAPO, arXiv:2503.14476 eq. 10; dual clip, arXiv:1912.09729 eq. 5.
    """
    return _clipped(_ratio(tokens.policy, tokens.behaviour), tokens.advantages, config)


@token_loss("gspo", uses=("clip_low", "clip_high", "dual_clip"))
def gspo(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`ppo_clip` with the sequence's geometric mean ratio at each of its tokens. GSPO, arXiv:2507.18071 eq. 7.

    The paper averages over sequences: use the denominator `sequences`, and bounds near 3e-4.
    """
    return _clipped(geometric_ratio(tokens), tokens.advantages, config)


@token_loss("dppo_tv", uses=("delta_low", "delta_high", "kl_tau"))
def dppo_tv(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`-A p/b` without the tokens whose probability moved more than delta the way A pushes, plus `kl_tau (log p/b)^2`.

    DPPO with binary total variation, arXiv:2602.04879. The quadratic term, which prime-rl adds, counts dropped tokens.
    """
    log_ratio_N = _log_ratio(tokens.policy, tokens.behaviour)
    moved_N = (tokens.policy.exp() - tokens.behaviour.exp()).detach()
    is_dropped = (moved_N > config.delta_high).where(tokens.advantages > 0, moved_N < -config.delta_low)
    surrogate_N = -tokens.advantages * log_ratio_N.exp() * ~is_dropped
    return TokenLoss(surrogate_N + config.kl_tau * log_ratio_N.square(), is_dropped)


_DECOUPLED = ("clip_low", "clip_high", "dual_clip", "proximal")


@token_loss("decoupled_tis", uses=(*_DECOUPLED, "tis_cap"), needs_proximal=True)
def decoupled_tis(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`ppo_clip` of p/q, times the token's truncated weight `min(q/b, cap)`.

    Decoupled objective of AReaL, arXiv:2505.24298 eq. 5, with truncation in place of the full weight.
    """
    weight_N = _ratio(tokens.proximal, tokens.behaviour).clamp(max=config.tis_cap)
    return _weighted(_clipped(_ratio(tokens.policy, tokens.proximal), tokens.advantages, config), weight_N)


@token_loss("decoupled_sequence_tis", uses=(*_DECOUPLED, "tis_cap"), needs_proximal=True)
def decoupled_sequence_tis(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """As `decoupled_tis` with one weight for each sequence: `min(prod_t q_t/b_t, cap)`."""
    total_S = _sum_per_sequence(tokens.proximal - tokens.behaviour, tokens.sequence)
    log_weight_N = total_S[tokens.sequence].clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    weight_N = log_weight_N.exp().clamp(max=config.tis_cap)
    return _weighted(_clipped(_ratio(tokens.policy, tokens.proximal), tokens.advantages, config), weight_N)


@token_loss("decoupled_mask", uses=(*_DECOUPLED, "mask_cap"), needs_proximal=True)
def decoupled_mask(tokens: Tokens, config: LossConfig) -> TokenLoss:
    """`ppo_clip` of p/q times q/b, without the tokens where q/b exceeds the cap. AReaL, arXiv:2505.24298 eq. 5."""
    weight_N = _ratio(tokens.proximal, tokens.behaviour)
    is_kept = weight_N <= config.mask_cap
    surrogate = _clipped(_ratio(tokens.policy, tokens.proximal), tokens.advantages, config)
    return TokenLoss(surrogate.loss * weight_N * is_kept, surrogate.is_clipped | ~is_kept)


def geometric_ratio(tokens: Tokens) -> Tensor:
    """`exp(mean over the sequence of log p/b)` at each of its tokens, shape (N,)."""
    log_ratio_N = _log_ratio(tokens.policy, tokens.behaviour)
    total_S = _sum_per_sequence(log_ratio_N, tokens.sequence)
    length_S = _sum_per_sequence(log_ratio_N.new_ones(log_ratio_N.shape), tokens.sequence)
    ratio_N: Tensor = (total_S / length_S.clamp(min=1))[tokens.sequence].exp()
    return ratio_N


def _log_ratio(numerator_N: Tensor, denominator_N: Tensor) -> Tensor:
    return (numerator_N - denominator_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _ratio(numerator_N: Tensor, denominator_N: Tensor) -> Tensor:
    return _log_ratio(numerator_N, denominator_N).exp()


def _clipped(ratio_N: Tensor, advantages_N: Tensor, config: LossConfig) -> TokenLoss:
    plain_N = -advantages_N * ratio_N
    bounded_N = -advantages_N * ratio_N.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_N = plain_N.maximum(bounded_N)
    is_negative = advantages_N < 0
    ceiling_N = -advantages_N * config.dual_clip
    is_held = (bounded_N > plain_N) | (is_negative & (loss_N > ceiling_N))
    return TokenLoss(loss_N.minimum(ceiling_N).where(is_negative, loss_N), is_held)


def _weighted(surrogate: TokenLoss, weight_N: Tensor) -> TokenLoss:
    return TokenLoss(surrogate.loss * weight_N, surrogate.is_clipped)


def _sum_per_sequence(value_N: Tensor, sequence_N: Tensor) -> Tensor:
    num_sequences = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    return value_N.new_zeros(num_sequences).index_add(0, sequence_N, value_N)


def _metrics(tokens: Tokens, is_clipped_N: Tensor) -> dict[str, float]:
    """Averages over tokens; `kl` is Schulman's k3 estimate of KL(b || p), `entropy` the mean of -log p."""
    if not len(is_clipped_N):
        return {}
    policy_N = tokens.policy.detach()
    log_ratio_N = _log_ratio(policy_N, tokens.behaviour)
    ratio_N = log_ratio_N.exp()
    values = {
        "clip_fraction": is_clipped_N.to(ratio_N.dtype).mean(),
        "ratio": ratio_N.mean(),
        "kl": (ratio_N - 1.0 - log_ratio_N).mean(),
        "entropy": -policy_N.mean(),
        "max_abs_log_ratio": (policy_N - tokens.behaviour).abs().max(),
    }
    return {name: float(value) for name, value in values.items()}
