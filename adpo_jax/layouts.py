"""How a batch on the device runs through the model, micro-batch by micro-batch.

Two layouts with the same face: rows (each completion behind its own copy of the prompt, padded: the
plain version) and packed streams (`packing`).

Letters: P prompts, G completions of a prompt, S prompt and completion tokens, T completion tokens,
B streams side by side, M micro-batches, N tokens of a stream, C completion places of it, D model
width.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from adpo_jax.packing import Batch, Micro, PackedBatch
from adpo_jax.policy import Policy
from adpo_jax.tile_attention import Stream


class MicroBatch(Protocol):
    """Completions that run through the model at once, in rows of places."""

    def hidden_and_targets(self, policy: Policy, params) -> tuple[jax.Array, jax.Array]:
        """Hidden states [rows, places, D], and the token [rows, places] that each predicts."""

    def values(self, values_PGT: jax.Array) -> jax.Array:
        """The values of its tokens, [rows, places], 0 where there is none."""


class Layout(Protocol):
    """A batch cut into micro-batches."""

    batch: Batch | PackedBatch

    @property
    def has_whole_groups(self) -> bool:
        """Whether no group is split over micro-batches."""

    def micro(self, i) -> MicroBatch:
        """The micro-batch with this number."""

    def loop(self, body, first):
        """Runs `body(carry, i) -> (carry, out)` over the micro-batches; (carry, outs)."""

    def by_group(self, outs: jax.Array) -> jax.Array:
        """What `loop` collected, from [micro-batches, rows, places] to [P, G, T]."""

    def fill(self, values_PGT: jax.Array, i, out: jax.Array) -> jax.Array:
        """The values with those of micro-batch i [rows, places] in their place."""


def layout_of(batch: Batch | PackedBatch, num_micro: int = 1) -> Layout:
    """The layout of a batch; `num_micro` as of `update.make_update`."""
    return PackedLayout(batch) if isinstance(batch, PackedBatch) else RowLayout(batch, num_micro)


class RowLayout(NamedTuple):
    """Padded rows; a micro-batch is some of the prompts with all their completions."""

    batch: Batch
    num_micro: int
    has_whole_groups = True

    def micro(self, i) -> "RowMicro":
        return RowMicro(self, i)

    def part(self, x_PZ, i):
        """The prompts of a micro-batch: every `num_micro`-th, so that all devices have some."""
        return x_PZ.reshape(-1, self.num_micro, *x_PZ.shape[1:])[:, i]

    def loop(self, body, first):
        if self.num_micro == 1:
            carry, out = body(first, 0)
            return carry, jax.tree.map(lambda x: x[None], out)
        return jax.lax.scan(body, first, jnp.arange(self.num_micro))

    def by_group(self, outs):
        P, G, T = self.batch.completion_mask_PGT.shape
        outs = outs.reshape(self.num_micro, -1, G, T)
        return jnp.moveaxis(outs, 0, 1).reshape(P, G, T)

    def fill(self, values_PGT, i, out):
        _, G, T = values_PGT.shape
        parts = values_PGT.reshape(-1, self.num_micro, G, T)
        return parts.at[:, i].set(out.reshape(-1, G, T)).reshape(values_PGT.shape)


class RowMicro(NamedTuple):
    """A row a completion, a place a completion token."""

    layout: RowLayout
    i: jax.Array

    def hidden_and_targets(self, policy: Policy, params):
        batch = self.layout.batch
        S, T = batch.tokens_PGS.shape[-1], batch.num_completion
        tokens = self.layout.part(batch.tokens_PGS, self.i).reshape(-1, S)
        mask = self.layout.part(batch.attention_mask_PGS, self.i).reshape(-1, S)
        return policy.hidden(params, tokens, mask)[:, -T - 1 : -1], tokens[:, -T:]

    def values(self, values_PGT):
        return self.layout.part(values_PGT, self.i).reshape(-1, values_PGT.shape[-1])


class PackedLayout(NamedTuple):
    """Streams of `packing`, side by side over the devices."""

    batch: PackedBatch

    @property
    def has_whole_groups(self) -> bool:
        return self.batch.whole_groups

    def micro(self, i) -> "PackedMicro":
        return PackedMicro(jax.tree.map(lambda x: x[:, i], self.batch.micro))

    def loop(self, body, first):
        max_micro = self.batch.micro.tokens.shape[1]
        if max_micro == 1:
            carry, out = body(first, 0)
            return carry, jax.tree.map(lambda x: x[None], out)

        def step(i, carry_and_outs):
            carry, outs = carry_and_outs
            carry, out = body(carry, i)
            return carry, jax.tree.map(lambda xs, x: xs.at[i].set(x), outs, out)

        _, out = jax.eval_shape(body, first, 0)
        outs = jax.tree.map(lambda s: jnp.zeros((max_micro, *s.shape), s.dtype), out)
        # Only the micro-batches that hold something: their number is data, not a shape.
        return jax.lax.fori_loop(0, self.batch.num_micro_B[0], step, (first, outs))

    def by_group(self, outs):
        B = outs.shape[1]
        outs = jnp.moveaxis(outs, 0, 1).reshape(B, -1)
        slots = self.batch.slots_PGT.reshape(B, -1)
        values = jnp.take_along_axis(outs, jnp.maximum(slots, 0), axis=1)
        return jnp.where(slots >= 0, values, 0.0).reshape(self.batch.slots_PGT.shape)

    def fill(self, values_PGT, i, out):
        B, C = out.shape
        slots = self.batch.slots_PGT.reshape(B, -1) - i * C
        found = jnp.take_along_axis(out, jnp.clip(slots, 0, C - 1), axis=1)
        filled = jnp.where((slots >= 0) & (slots < C), found, values_PGT.reshape(B, -1))
        return filled.reshape(values_PGT.shape)


class PackedMicro(NamedTuple):
    """A stream a batch shard of the mesh."""

    streams: Micro

    def hidden_and_targets(self, policy: Policy, params):
        streams = self.streams
        attend = policy.stream_attention(
            Stream(streams.positions, streams.segments, streams.prompts, streams.key_tiles)
        )
        hidden, *_ = policy(params, streams.tokens, streams.positions, attend=attend)
        return hidden[:, -streams.targets.shape[1] :], streams.targets

    def values(self, values_PGT):
        places = self.streams.places
        values = values_PGT.reshape(places.shape[0], -1)
        found = jnp.take_along_axis(values, jnp.maximum(places, 0), axis=1)
        return jnp.where(places >= 0, found, 0.0)
