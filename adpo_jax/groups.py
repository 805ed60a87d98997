"""What the losses share: rewards in groups, whole-batch normalisers, log-ratios, argument checks.

Letters: P prompts, G completions of a prompt, T tokens. All floats are float32, float64 under x64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]

# exp() of a log-ratio is continued linearly from here on: exp(40)^2 = 5.5e34 still fits float32, so
# the squared norm of a gradient stays finite too, and the gradient keeps its direction.
_LINEAR_FROM = 40.0


class Weights(NamedTuple):
    """Normalisers of a whole batch, one row a prompt so that they are sliced with it."""

    kept_group_P: jax.Array  # 1 / number of kept groups; 0 for a dropped group
    kept_token_P: jax.Array  # 1 / number of completion tokens in kept groups; 0 for a dropped group
    group_P: jax.Array  # 1 / P
    token_P: jax.Array  # 1 / number of completion tokens


def scale_rewards(
    rewards_PG: jax.Array, scale: str, min_reward_std: float, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Rewards less their group's mean, over a standard deviation (ddof=1) + eps.

    Args:
      rewards_PG: [P, G], the whole batch.
      scale: "group", "batch" or "none", the rewards whose standard deviation divides.
      min_reward_std: a group below it counts as all equal: zeros.

    Returns:
      [P, G] the scaled rewards, and [P] bool: has the group a spread?
    """
    # Relative to the group's first reward, so that equal rewards give exactly 0: the float32 mean
    # of six times 0.9 is off by 6e-8, which would be a spread, in GRPO an advantage of -0.06.
    relative_PG = rewards_PG - rewards_PG[:, :1]
    centred_PG = relative_PG - relative_PG.mean(-1, keepdims=True)
    std_P = jnp.std(relative_PG, axis=-1, ddof=1)
    spread_P = (std_P > 0) & (std_P >= min_reward_std)
    centred_PG = jnp.where(spread_P[:, None], centred_PG, 0.0)
    if scale == "group":
        centred_PG = centred_PG / (std_P[:, None] + eps)
    elif scale == "batch":
        centred_PG = centred_PG / (jnp.std(rewards_PG, ddof=1) + eps)
    return centred_PG, spread_P


def kept_prompts(rewards_PG: jax.Array, drop_all_failed_prompts: bool) -> jax.Array:
    """[P] bool; a prompt has failed when all its rewards are <= 0."""
    if not drop_all_failed_prompts:
        return jnp.ones(rewards_PG.shape[0], bool)
    return (rewards_PG > 0).any(-1)


def batch_weights(kept_P: jax.Array, mask_PGT: jax.Array) -> Weights:
    """The normalisers of a batch from its kept prompts and its completion mask."""
    dtype = jnp.result_type(float)
    kept_P = kept_P.astype(dtype)
    tokens_P = mask_PGT.astype(bool).sum((1, 2)).astype(dtype)
    ones_P = jnp.ones_like(kept_P)
    return Weights(
        kept_group_P=kept_P / jnp.maximum(kept_P.sum(), 1.0),
        kept_token_P=kept_P / jnp.maximum((kept_P * tokens_P).sum(), 1.0),
        group_P=ones_P / kept_P.shape[0],
        token_P=ones_P / jnp.maximum(tokens_P.sum(), 1.0),
    )


def lengths(mask_PGT: jax.Array) -> jax.Array:
    """Tokens of each completion, [P, G], at least 1 so that it can divide."""
    return jnp.maximum(mask_PGT.astype(bool).sum(-1), 1).astype(jnp.result_type(float))


def log_ratios(
    log_probs_PGT: jax.Array, anchor_log_probs_PGT: jax.Array, mask_PGT: jax.Array
) -> jax.Array:
    """log_prob - anchor_log_prob per token, 0 under the mask whatever lies there.

    Subtracted token by token in float32: summed first, 1,024 tokens in bf16 lose half a nat.
    """
    # Masked before the subtraction as well: -inf - -inf is NaN, and so would its gradient be.
    mask_PGT = mask_PGT.astype(bool)
    dtype = jnp.result_type(float)
    policy_PGT = jnp.where(mask_PGT, log_probs_PGT, 0.0).astype(dtype)
    anchor_PGT = jnp.where(mask_PGT, anchor_log_probs_PGT, 0.0).astype(dtype)
    return policy_PGT - jax.lax.stop_gradient(anchor_PGT)


def expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1, exact near 0, linear from 40 nats on."""
    beyond = jnp.maximum(x - _LINEAR_FROM, 0.0)
    return jnp.expm1(jnp.minimum(x, _LINEAR_FROM)) + math.exp(_LINEAR_FROM) * beyond


def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = -log_ratio: an estimate of the KL, never negative.

    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return expm1(-log_ratio) + log_ratio


def entropy(q_PG: jax.Array) -> jax.Array:
    """[P] in nats."""
    return -jax.scipy.special.xlogy(q_PG, q_PG).sum(-1)


def shared_metrics(
    prefix: str, log_ratio_PG: jax.Array, k3_P: jax.Array, scores: NamedTuple, weights: Weights
) -> Metrics:
    """The metrics that every loss has, as sums; `scores` has the fields kept_P and spread_P."""
    return {
        f"{prefix}/anchor_kl": (weights.token_P * k3_P).sum(),
        f"{prefix}/abs_log_ratio": (weights.group_P * jnp.abs(log_ratio_PG).mean(-1)).sum(),
        f"{prefix}/dropped_prompts": (~scores.kept_P).sum(dtype=k3_P.dtype),
        f"{prefix}/zero_std_frac": jnp.where(scores.spread_P, 0.0, weights.group_P).sum(),
    }


def as_groups(array: jax.Array) -> jax.Array:
    """The array as float [P, G], or ValueError."""
    array = jnp.asarray(array).astype(jnp.result_type(float))
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            "expected [P, G], a row a prompt and at least 2 completions in it, got shape "
            f"{array.shape}"
        )
    return array


def check_mask(mask_PGT: jax.Array, shape_PG: tuple[int, int]) -> None:
    """Raises ValueError unless the mask is [P, G, T] of the groups' P and G."""
    if mask_PGT.ndim != 3 or mask_PGT.shape[:2] != shape_PG:
        raise ValueError(
            f"the mask must be [P, G, T] with [P, G] = {shape_PG} as the rewards have, "
            f"got {mask_PGT.shape}"
        )


def check_number(name: str, value: float, *, above: float = -math.inf, least: float = -math.inf):
    """Raises ValueError unless `value` is a finite number > above and >= least."""
    wanted = f"a finite number above {above:g}" if least == -math.inf else f"at least {least:g}"
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {wanted}, fixed at trace time, got {value!r}") from error
    if not (math.isfinite(number) and number > above and number >= least):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
