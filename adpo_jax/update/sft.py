"""Supervised training on worked examples: the cold start before reinforcement, for any config.

A step is an update like any other (`step`), with a loss of its own over groups of one completion.
Its demonstrations lie in padded rows, or in packed streams where these have far fewer places. All
steps have one shape and compile once: their demonstrations are known before the first step, so the
streams have the size of the fullest step.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
import optax

from adpo_jax.devices import sharding
from adpo_jax.losses.imitation import Imitation
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Batch, Completion, Sequences, make_batch
from adpo_jax.update import TrainState, make_update
from adpo_jax.update.packing import PackedBatch, Packing, balanced, starts_of
from adpo_jax.update.stream_sizes import Size, tile_of


def demonstrations(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Sequences:
    """Worked examples as sequences: groups of one completion each, which nobody sampled.

    Args:
      prompts, completions: P lists of token ids.
    """
    groups = [[Completion.sampled(ids, np.zeros(len(ids)), "stop")] for ids in completions]
    return Sequences(list(prompts), groups)


# A place of a stream costs up to twice as much as one of a row, in a small model on a CPU
# (`scripts/bench_cold_start.py`: its case "arithmetic" has 1.35 times the places in rows, and they
# take 0.76 times the time).
PACKED_FROM = 2.0  # times the places, in rows


def choose_layout(
    policy: Policy,
    examples: Sequences,
    steps: Iterable[np.ndarray],
    *,
    batch_size: int,
    prompt_length: int,
    completion_length: int,
    rows_per_micro: int = 0,
) -> "InStreams | InRows":
    """The layout in which a stage's steps take least time; a pure function of their lengths.

    The arguments are those of `InStreams`.
    """
    longest = {"prompt_length": prompt_length, "completion_length": completion_length}
    streams = InStreams(policy, examples, steps, rows_per_micro=rows_per_micro, **longest)
    in_rows = batch_size * (prompt_length + completion_length)
    if in_rows >= PACKED_FROM * streams.num_places:
        return streams
    return InRows(examples, **longest)


class InStreams:
    """Lays the demonstrations of a step out in packed streams.

    Args:
      examples: all demonstrations.
      steps: for each step of the stage the numbers of its demonstrations.
      prompt_length, completion_length: tokens of the longest ones that there may be.
      rows_per_micro: as many demonstrations of full length run through a device at once, or more
        shorter ones; 0 for all.
    """

    def __init__(
        self,
        policy: Policy,
        examples: Sequences,
        steps: Iterable[np.ndarray],
        *,
        prompt_length: int,
        completion_length: int,
        rows_per_micro: int = 0,
    ):
        self._examples = examples
        spread = sharding.BatchSharding(policy.mesh)
        self._num_shards = spread.num_shards
        self._tile = tile_of(policy.attention_settings.platform, completion_length)
        self._options = {
            "num_shards": self._num_shards,
            "completions_per_micro": rows_per_micro,
            "full_length": prompt_length + completion_length,
            "count_prompts": True,
            "tile": self._tile,
            "starts": starts_of([policy.config], self._tile),
            "shares": spread.num_shares,
        }
        needed = (Packing(self._step(rows), **self._options).needed for rows in steps)
        self.size = Size(*map(max, zip(*needed))).in_tiles(self._tile * spread.num_shares)

    @property
    def num_places(self) -> int:
        """The places that the fullest step runs through the model."""
        return self._num_shards * self.size.room * self.size.places

    def __call__(self, rows: np.ndarray) -> PackedBatch:
        """The batch of a step, as host arrays."""
        sequences = self._step(rows)
        return Packing(sequences, size=self.size, **self._options).batch(sequences)

    def _step(self, rows: np.ndarray) -> Sequences:
        """The demonstrations of a step, in an order that gives every device as many tokens."""
        chosen = self._examples.select(rows)
        return chosen.select(balanced(chosen.tokens_of_groups, self._num_shards))


class InRows:
    """Lays the demonstrations of a step out in padded rows: the plain version of `InStreams`.

    Args:
      examples: all demonstrations.
      prompt_length, completion_length: tokens that prompts and completions are padded to.
    """

    def __init__(self, examples: Sequences, *, prompt_length: int, completion_length: int):
        self._examples = examples
        self._lengths = {"prompt_length": prompt_length, "completion_length": completion_length}

    def __call__(self, rows: np.ndarray) -> Batch:
        """The batch of a step, as host arrays."""
        chosen = self._examples.select(rows)
        return make_batch(chosen.prompts, chosen.completions, **self._lengths)


def make_sft_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    rows_per_micro: int = 0,
) -> Callable[[TrainState, Batch | PackedBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The supervised step, `(state, batch) -> (state, metrics)`.

    It donates the state and takes a batch that `InStreams` or `InRows` made. "sft/loss" is among
    the metrics. As in every update, a step whose loss or gradient is not finite leaves the
    parameters as they were, and "update/skipped" is 1.

    Args:
      batch_size: demonstrations of a batch.
      rows_per_micro: the most padded rows that a device holds at once; 0 for all.
    """
    shards = sharding.BatchSharding(policy.mesh)
    rows = batch_size // shards.num_shards
    num_micro = next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= (rows_per_micro or rows)
    )
    update = make_update(policy, Imitation(), optimizer, num_micro=num_micro, with_entropy=False)

    def step(state: TrainState, batch: Batch | PackedBatch):
        state, metrics = update(state, shards.put(batch), None, None)
        return state.replace(step=state.step + 1), metrics

    return step
