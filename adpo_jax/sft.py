"""Supervised training on worked examples: the cold start before reinforcement, for any config.

A step is an update like any other (`update`), in micro-batches, with a loss of its own over groups
of one completion. Its rows are padded, not packed: all steps have one shape and compile once, where
packed ones of the arithmetic example had 22.

Letters: P prompts, T completion tokens, S prompt and completion tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adpo_jax import sharding
from adpo_jax.data import prompt_indices
from adpo_jax.packing import Batch
from adpo_jax.policy import Policy
from adpo_jax.update import TrainState, make_update


@dataclasses.dataclass(frozen=True)
class Imitation:
    """The mean negative log-prob of a completion token in nats, by the pieces of `losses`."""

    def normalise(self, scores: None, mask_PGT: jax.Array) -> jax.Array:
        """1 / number of completion tokens of an optimizer step."""
        return 1.0 / jnp.maximum(jnp.sum(mask_PGT), 1.0)

    def loss(self, log_probs_PGT, anchor_log_probs_PGT, mask_PGT, per_token):
        """(loss, metrics); without an anchor, whose log-probs play no part."""
        loss = -per_token * jnp.sum(jnp.where(mask_PGT > 0, log_probs_PGT, 0.0))
        return loss, {"sft/loss": loss}


def make_sft_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    rows_per_micro: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`(state, batch) -> (state, metrics)`, the state donated, the batch of `batches`.

    "sft/loss" is among the metrics. As in every update, a step whose loss or gradient is not finite
    leaves the parameters as they were, and "update/skipped" is 1.

    Args:
      batch_size: rows of a batch.
      rows_per_micro: rows that a device holds at once, at most; 0 for all.
    """
    shards = sharding.BatchSharding(policy.mesh)
    rows = batch_size // shards.num_shards
    num_micro = next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (rows_per_micro or rows)
    )
    update = make_update(policy, Imitation(), optimizer, num_micro=num_micro, with_entropy=False)

    def step(state: TrainState, batch: Batch):
        state, metrics = update(state, shards.put(batch), None, None)
        return state.replace(step=state.step + 1), metrics

    return step


def make_batch(
    prompts: list[list[int]], completions: list[list[int]], *, prompt_length: int, length: int
) -> Batch:
    """Groups of one completion each, prompts padded on their left, completions on their right.

    Args:
      prompts, completions: P lists of token ids, at most `prompt_length` and `length` long.

    Returns:
      P prompts, T = length, S = prompt_length + length; the sampler's log-probs are 0.
    """
    P = len(prompts)
    tokens = np.zeros((P, 1, prompt_length + length), np.int32)
    attention_mask = np.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        first, last = prompt_length - len(prompt), prompt_length + len(completion)
        tokens[row, 0, first:last] = prompt + completion
        attention_mask[row, 0, first:last] = 1
    mask = attention_mask[..., prompt_length:].astype(np.float32)
    return Batch(tokens, attention_mask, mask, np.zeros_like(mask))


def batches(
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    first: int = 0,
    num_steps: int,
    batch_size: int,
    seed: int,
    prompt_length: int,
    length: int,
) -> Iterator[Batch]:
    """The batches of steps `first` to `num_steps`, as `make_batch` makes them, a function of both
    and the seed alone.
    """
    for step in range(first, num_steps):
        rows = prompt_indices(step, seed=seed, num_rows=len(prompts), batch_size=batch_size)
        yield make_batch(
            [prompts[i] for i in rows],
            [completions[i] for i in rows],
            prompt_length=prompt_length,
            length=length,
        )
