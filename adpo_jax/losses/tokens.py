"""Which token of a batch belongs to which completion, in the layouts that an update has.

Letters: B rows of streams or prompts, P prompts, G completions of a prompt, T tokens.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Tokens(Protocol):
    """Which token of a batch belongs to which completion, in any layout.

    Attributes:
      trained: bool, of the shape that log-probs have; False where there is no token, and at tokens
        that are not trained on.
      width: the most tokens that a completion may have, where the layout knows it.
    """

    trained: jax.Array
    width: int

    def sum(self, values: jax.Array) -> jax.Array:
        """The values of trained tokens, summed over each completion: [P, G]."""

    def spread(self, values_PG: jax.Array) -> jax.Array:
        """Each completion's value at its trained tokens, in the shape of `trained`; 0 elsewhere."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PaddedTokens:
    """Tokens in a rectangle [P, G, T], a row a completion."""

    trained: jax.Array

    @property
    def width(self) -> int:
        return self.trained.shape[-1]

    def sum(self, values):
        return jnp.where(self.trained, values, 0).sum(-1)

    def spread(self, values_PG):
        return jnp.where(self.trained, values_PG[..., None], 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamTokens:
    """Tokens side by side in B streams [B, ...], the prompts split evenly over the streams.

    Attributes:
      completion: int32, in the shape of `trained`: the number of each token's completion among the
        P / B * G of its stream.
      num_prompts, group_size: P and G.
    """

    trained: jax.Array
    completion: jax.Array
    num_prompts: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})

    @property
    def width(self) -> int:
        raise ValueError("packed streams know no longest completion: give constant_length")

    def _flat(self, values):
        return values.reshape(self.trained.shape[0], -1)

    def sum(self, values):
        B = self.trained.shape[0]
        values = self._flat(jnp.where(self.trained, values, 0))
        size = self.num_prompts // B * self.group_size

        def of_stream(values, completion):
            return jax.ops.segment_sum(values, completion, num_segments=size)

        sums = jax.vmap(of_stream)(values, self._flat(self.completion))
        return sums.reshape(self.num_prompts, self.group_size)

    def spread(self, values_PG):
        values = values_PG.reshape(self.trained.shape[0], -1)
        found = jnp.take_along_axis(values, self._flat(self.completion), axis=1)
        return jnp.where(self.trained, found.reshape(self.trained.shape), 0)
