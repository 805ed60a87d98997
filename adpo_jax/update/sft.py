"""Supervised training on worked examples: the cold start before reinforcement, for any config.

A step is an update like any other (`step`), in micro-batches, with a loss of its own over groups of
one completion. Its rows are padded, not packed, so that all steps have one shape and compile once;
packed steps of the arithmetic example had 22 shapes.

Letters: P prompts, T completion tokens, S prompt and completion tokens.
"""

from collections.abc import Callable

import jax
import numpy as np
import optax

from adpo_jax.devices import sharding
from adpo_jax.losses.imitation import Imitation
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Batch, Completion, make_batch
from adpo_jax.update import TrainState, make_update


def make_sft_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    rows_per_micro: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The supervised step, `(state, batch) -> (state, metrics)`.

    It donates the state and takes a batch that `demonstrations` made. "sft/loss" is among the
    metrics. As in every update, a step whose loss or gradient is not finite leaves the parameters
    as they were, and "update/skipped" is 1.

    Args:
      batch_size: rows of a batch.
      rows_per_micro: the most rows that a device holds at once; 0 for all.
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


def demonstrations(
    prompts: list[list[int]], completions: list[list[int]], *, prompt_length: int, length: int
) -> Batch:
    """Demonstrations as a padded batch: groups of one completion each, which nobody sampled.

    Args:
      prompts, completions: P lists of token ids, at most `prompt_length` and `length` long.
    """
    groups = [[Completion.sampled(ids, np.zeros(len(ids)), "stop")] for ids in completions]
    return make_batch(prompts, groups, prompt_length=prompt_length, completion_length=length)
