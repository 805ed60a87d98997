"""The losses as pure functions of a flat batch, for people with a training loop of their own.

Letters: B rows (P * G), P prompts, G completions of a prompt, T tokens.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.losses.algorithm import Algorithm
from adpo_jax.losses.shared import Metrics
from adpo_jax.losses.tokens import PaddedTokens

_DOC = """The {name} loss of a flat batch; `{algorithm}` has the equation and the parameters.

B = prompts * num_generations, the rows of a prompt adjacent. Rows past the last whole group are
ignored, and a warning says how many there are. Differentiable with respect to `log_probs`, and to
`entropy` where it is given.

Args:
  log_probs: [B, T] any float dtype, per token, anything under the mask.
  anchor_log_probs: [B, T], the same under the anchor.
  rewards: [B], one a completion; or [B, K], K of them, NaN where there is none.
  completion_mask: [B, T] bool or 0/1; 0 anywhere at tokens that are not trained on.
  num_generations: G, at least 2.
  reference_log_probs: [B, T], the same under the reference, where beta_reference_kl is above 0.
  sampler_log_probs: [B, T], the same under the sampler, where there is a sampler_correction.
  reward_weights: [K], of the kinds of rewards; None for 1.
  entropy: [B, T], the policy's entropy at each token, where entropy_bonus is above 0.
{further}  **parameters: those of `{algorithm}`, by name.

Returns:
  Scalar float32 loss (float64 under x64) and a flat dict of scalars:
{metrics}

Raises:
  ValueError: B < num_generations, mismatched shapes, a parameter that cannot work, log-probs that a
    parameter needs and that are not given.
"""

# What some losses take besides: one that learns from a teacher, and one that adapts tau.
_OF_ENTROPY = {
    "entropy_P": "[P] in [0, 1], the mean token entropy on each prompt under the anchor over "
    "log(vocabulary size), under adaptive_tau_mode policy_entropy.",
}
_OF_TEACHER = {
    "teacher_log_probs": "[B, T], the same under the teacher, under reverse_kl.",
    "divergence": "[B, T], from the teacher at each token, under jsd; the gradient flows into it.",
}


class LossFunction(Protocol):
    """The shape of the losses; `inspect.signature` of each tells its parameters."""

    __name__: str

    def __call__(
        self,
        log_probs: jax.Array,
        anchor_log_probs: jax.Array,
        rewards: jax.Array,
        completion_mask: jax.Array,
        *,
        num_generations: int = 8,
        reference_log_probs: jax.Array | None = None,
        sampler_log_probs: jax.Array | None = None,
        reward_weights: jax.Array | None = None,
        entropy: jax.Array | None = None,
        **parameters: Any,
    ) -> tuple[jax.Array, Metrics]: ...


def loss_function(algorithm: type[Algorithm]) -> LossFunction:
    """The algorithm's loss as a function of a flat batch, named after it."""
    fields = [field.name for field in dataclasses.fields(algorithm)]
    further = _OF_TEACHER if algorithm.needs_teacher else {}
    further = further | (_OF_ENTROPY if "adaptive_tau_mode" in fields else {})

    def loss(
        log_probs,
        anchor_log_probs,
        rewards,
        completion_mask,
        *,
        num_generations=8,
        reference_log_probs=None,
        sampler_log_probs=None,
        reward_weights=None,
        entropy=None,
        **parameters,
    ):
        optional = {name: parameters.pop(name, None) for name in further}
        unknown = sorted(parameters.keys() - fields)
        if unknown:
            raise TypeError(
                f"{loss.__name__} has no parameter {', '.join(unknown)}; it has {', '.join(fields)}"
            )
        found = {
            "policy": log_probs,
            "anchor": anchor_log_probs,
            "reference": reference_log_probs,
            "sampler": sampler_log_probs,
            "teacher": optional.get("teacher_log_probs"),
            "divergence": optional.get("divergence"),
        }
        given = {
            "log_probs": log_probs,
            "anchor_log_probs": anchor_log_probs,
            "rewards": rewards,
            "completion_mask": completion_mask,
        }
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise TypeError(f"{loss.__name__} needs {missing[0]}, an array; given None")
        made = algorithm(**parameters)
        rewards = jnp.asarray(rewards), reward_weights
        entropies = entropy, optional.get("entropy_P")
        return _flat_loss(made, found, rewards, completion_mask, num_generations, entropies)

    loss.__name__ = loss.__qualname__ = f"{algorithm.name}_loss"
    loss.__module__ = "adpo_jax.losses"
    metrics = (f"    {algorithm.name}/{m.name}: {m.meaning}" for m in algorithm.declared_metrics())
    loss.__doc__ = _DOC.format(
        name=algorithm.name,
        algorithm=algorithm.__name__,
        metrics="\n".join(metrics),
        further="".join(f"  {name}: {meaning}\n" for name, meaning in further.items()),
    )
    *given, _ = inspect.signature(LossFunction.__call__).parameters.values()
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (
            *dict.fromkeys(further).items(),
            *((field.name, field.default) for field in dataclasses.fields(algorithm)),
        )
    ]
    loss.__signature__ = inspect.Signature(
        [*given[1:], *own], return_annotation=tuple[jax.Array, Metrics]
    )
    return loss


def _flat_loss(
    algorithm: Algorithm,
    log_probs: Mapping[str, jax.Array | None],
    weighted_rewards: tuple[jax.Array, Any],
    completion_mask: jax.Array,
    num_generations: int,
    entropies: tuple[Any, Any],
) -> tuple[jax.Array, Metrics]:
    """Folds [B, T] into [P, G, T], trailing rows dropped, and applies `algorithm` to it.

    Args:
      log_probs: as for `Algorithm.loss`, but [B, T] each, and None for those that are not given.
      weighted_rewards: the rewards, [B] or [B, K], and the weights of the K kinds.
      entropies: those of each token, [B, T], and of each prompt, [P]; None for not given.
    """
    rewards, weights = weighted_rewards
    entropy, entropy_P = entropies
    entropy = None if entropy is None else jnp.asarray(entropy)
    if weights is not None and rewards.ndim != 2:
        raise ValueError(
            f"reward_weights go with several kinds of rewards, [B, K]; rewards are {rewards.shape}"
        )
    log_probs = {whose: jnp.asarray(x) for whose, x in log_probs.items() if x is not None}
    for whose, parameter in (
        ("reference", "beta_reference_kl"),
        ("sampler", "sampler_correction"),
        ("teacher", "distillation_loss"),
    ):
        if whose in algorithm.needs - log_probs.keys():
            raise ValueError(
                f"{parameter}={getattr(algorithm, parameter)} needs {whose}_log_probs, the "
                f"log-probs of the completions under the {whose}: pass them too"
            )
    completion_mask = jnp.asarray(completion_mask)
    shape = log_probs["policy"].shape
    if len(shape) != 2:
        raise ValueError(f"log_probs must be [B, T], one number a token, got {shape}")
    for name, array, wanted in (
        *(
            (whose if whose == "divergence" else f"{whose}_log_probs", x, shape)
            for whose, x in log_probs.items()
            if whose != "policy"
        ),
        *(() if entropy is None else (("entropy", entropy, shape),)),
        ("completion_mask", completion_mask, shape),
        ("rewards", rewards, (*shape[:1], *rewards.shape[1:2])),
    ):
        if name == "rewards" and array.ndim == 2 and array.size == shape[0] != len(array):
            raise ValueError(
                f"rewards must have shape {shape[:1]}, one a row of log_probs {shape}, got "
                f"{array.shape}: flatten those of each prompt by rewards.reshape(-1)"
            )
        if array.shape != wanted:
            raise ValueError(
                f"{name} must have shape {wanted} to go with log_probs {shape}, got {array.shape}"
            )
    if isinstance(num_generations, jax.core.Tracer):
        raise ValueError(
            "num_generations must be a whole number of at least 2 that is fixed at trace time, got "
            'one that is traced: give jax.jit static_argnames="num_generations"'
        )
    is_whole = isinstance(num_generations, int | np.integer | float)
    if not is_whole or num_generations % 1 or num_generations < 2:
        raise ValueError(
            f"num_generations must be a whole number of at least 2, got {num_generations!r}: "
            "completions are compared within their group"
        )
    group = int(num_generations)
    num_groups = shape[0] // group
    if num_groups == 0:
        raise ValueError(
            f"the batch has {shape[0]} rows, fewer than one group of "
            f"num_generations={num_generations}: pass whole groups or lower num_generations"
        )
    if left_out := shape[0] % group:
        warnings.warn(
            f"{left_out} of {shape[0]} rows are left out of the {algorithm.name} loss: "
            f"{num_groups} whole groups of num_generations={group} come before them. The rows of a "
            "prompt must be adjacent, and num_generations the number of completions of each prompt",
            stacklevel=3,
        )

    def fold(array):
        return array[: num_groups * group].reshape(num_groups, group, *array.shape[1:])

    tokens = PaddedTokens(fold(completion_mask).astype(bool))
    prepared = algorithm.prepare(fold(rewards), tokens, weights=weights, entropy_P=entropy_P)
    folded = {whose: fold(array) for whose, array in log_probs.items()}
    entropy = None if entropy is None else fold(entropy)
    return algorithm.loss(folded, tokens, prepared, entropy=entropy)
