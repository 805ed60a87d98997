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
  TypeError: a parameter that `{algorithm}` does not have, or None for an array.
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
        return _flat_loss(
            algorithm(**parameters),
            {whose: jnp.asarray(x) for whose, x in found.items() if x is not None},
            jnp.asarray(rewards),
            jnp.asarray(completion_mask),
            num_generations,
            reward_weights=reward_weights,
            entropy=None if entropy is None else jnp.asarray(entropy),
            entropy_P=optional.get("entropy_P"),
        )

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
    log_probs: Mapping[str, jax.Array],
    rewards: jax.Array,
    completion_mask: jax.Array,
    num_generations: int,
    *,
    reward_weights: jax.Array | None,
    entropy: jax.Array | None,
    entropy_P: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
    """Folds [B, T] into [P, G, T], trailing rows dropped, and applies `algorithm` to it.

    Args:
      log_probs: as for `Algorithm.loss`, but [B, T] each.
      rewards: [B] or [B, K].
    """
    _check_log_probs(algorithm, log_probs)
    _check_rewards(rewards, reward_weights, log_probs["policy"].shape)
    _check_shapes(log_probs, entropy=entropy, completion_mask=completion_mask)
    rows = len(rewards)
    G = _group_size(num_generations, rows)
    P, left_out = divmod(rows, G)
    if left_out:
        warnings.warn(
            f"{left_out} of {rows} rows are left out of the {algorithm.name} loss: "
            f"{P} whole groups of num_generations={G} come before them. The rows of a "
            "prompt must be adjacent, and num_generations the number of completions of each prompt",
            stacklevel=3,
        )

    def fold(array):
        return array[: P * G].reshape(P, G, *array.shape[1:])

    tokens = PaddedTokens(fold(completion_mask).astype(bool))
    prepared = algorithm.prepare(fold(rewards), tokens, weights=reward_weights, entropy_P=entropy_P)
    folded = {whose: fold(array) for whose, array in log_probs.items()}
    return algorithm.loss(
        folded, tokens, prepared, entropy=None if entropy is None else fold(entropy)
    )


def _check_log_probs(algorithm: Algorithm, log_probs: Mapping[str, jax.Array]) -> None:
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
    if log_probs["policy"].ndim != 2:
        raise ValueError(
            f"log_probs must be [B, T], one number a token, got {log_probs['policy'].shape}"
        )


def _check_rewards(rewards: jax.Array, weights: jax.Array | None, shape: tuple[int, int]) -> None:
    """Checks rewards against the shape of the log-probs, [B, T]."""
    if weights is not None and rewards.ndim != 2:
        raise ValueError(
            f"reward_weights go with several kinds of rewards, [B, K]; rewards are {rewards.shape}"
        )
    if rewards.ndim == 2 and rewards.size == shape[0] != len(rewards):
        raise ValueError(
            f"rewards must have shape {shape[:1]}, one a row of log_probs {shape}, got "
            f"{rewards.shape}: flatten those of each prompt by rewards.reshape(-1)"
        )
    _check_shape("rewards", rewards, (*shape[:1], *rewards.shape[1:2]), shape)


def _check_shapes(log_probs: Mapping[str, jax.Array], **others: jax.Array | None) -> None:
    """Checks that all arrays have the shape of the policy's log-probs."""
    shape = log_probs["policy"].shape
    named = {
        whose if whose == "divergence" else f"{whose}_log_probs": x
        for whose, x in log_probs.items()
        if whose != "policy"
    }
    for name, array in (named | others).items():
        if array is not None:
            _check_shape(name, array, shape, shape)


def _check_shape(name: str, array: jax.Array, wanted: tuple[int, ...], shape) -> None:
    if array.shape != wanted:
        raise ValueError(
            f"{name} must have shape {wanted} to go with log_probs {shape}, got {array.shape}"
        )


def _group_size(num_generations: Any, rows: int) -> int:
    """G, of a batch of so many rows."""
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
    if rows < num_generations:
        raise ValueError(
            f"the batch has {rows} rows, fewer than one group of "
            f"num_generations={num_generations}: pass whole groups or lower num_generations"
        )
    return int(num_generations)
