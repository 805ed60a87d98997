"""How a batch on the device runs through the model, micro-batch by micro-batch.

There are two layouts with the same methods. Rows are the plain version: each completion lies behind
its own copy of the prompt, padded. Streams are packed (`packing`). Arrays with one number a token
(log-probs, whether it is trained on) have the shape of their layout: [P, G, T] in rows, [B, M, C]
in streams.

Letters: P prompts, G completions of a prompt, S prompt and completion tokens, T completion tokens,
B streams side by side, M micro-batches, N tokens of a stream, C completion places of it, D model
width.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from adpo_jax.losses.algorithm import Prepared
from adpo_jax.losses.tokens import PaddedTokens, StreamTokens, Tokens
from adpo_jax.model.tile_attention import Stream
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Batch
from adpo_jax.update.packing import PackedBatch
from adpo_jax.update.streams import Micro


class MicroBatch(Protocol):
    """Completions that run through the model at once, in rows of places.

    Attributes:
      tokens: which tokens of its part of the batch are trained on, and whose they are.
    """

    tokens: Tokens

    def hidden_and_targets(
        self, policy: Policy, params
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Hidden states [rows, places, D], the tokens [rows, places] that they predict, extras.

        The extras are those of the layers, over all tokens of the micro-batch.
        """

    @property
    def without_experts(self) -> "MicroBatch":
        """The same for a model other than the sampler's, whose router chooses for itself."""

    def of(self, values: jax.Array) -> jax.Array:
        """This micro-batch's part of `values`, which have the shape of the layout."""

    def rows(self, values: jax.Array) -> jax.Array:
        """`values` of this micro-batch's part, reshaped to [rows, places]."""

    def from_rows(self, values: jax.Array) -> jax.Array:
        """`values` [rows, places], reshaped to the shape of this micro-batch's part."""

    def prepared(self, prepared: Prepared) -> Prepared:
        """The part of `prepared` that the loss of this micro-batch alone needs."""


class Layout(Protocol):
    """A batch cut into micro-batches.

    Attributes:
      batch: what is laid out.
      tokens: which tokens of the whole batch are trained on, and whose they are.
      log_probs: log-probs under other policies by the policies' names, in the shape of the layout.
      has_whole_groups: whether each group lies in one micro-batch.
    """

    batch: Batch | PackedBatch
    tokens: Tokens
    log_probs: dict[str, jax.Array]
    has_whole_groups: bool

    @property
    def most_micro(self) -> int:
        """Micro-batches, or the most that there may be."""

    @property
    def num_tokens(self) -> jax.Array:
        """Tokens that run through the model, prompts included, float32."""

    def part(self, batch, log_probs, num_parts: int) -> "Layout":
        """The layout of one of `num_parts` equal parts of the batch, which `batch` is."""

    def micro(self, i) -> MicroBatch:
        """The micro-batch number `i`."""

    def loop(self, body, first):
        """Runs `body(carry, i) -> (carry, out)` over the micro-batches; returns (carry, outs)."""

    def in_layout(self, outs: jax.Array) -> jax.Array:
        """The `outs` of `loop`, [micro-batches, rows, places], in the shape of the layout."""


def layout_of(
    batch: Batch | PackedBatch, log_probs: dict[str, Any] | None = None, num_micro: int = 1
) -> Layout:
    """The layout of a batch.

    Args:
      log_probs: log-probs under other policies, as the step of `step.make_update` takes them.
      num_micro: micro-batches of a padded `Batch`; a `PackedBatch` has its own.
    """
    if isinstance(batch, PackedBatch):
        return PackedLayout(batch, batch.log_probs | (log_probs or {}))
    if len(batch.tokens_PGS) % num_micro:
        raise ValueError(
            f"num_micro={num_micro} must divide the number of prompts, {len(batch.tokens_PGS)}"
        )
    return RowLayout(batch, {"sampler": batch.sampler_log_probs_PGT} | (log_probs or {}), num_micro)


class RowLayout(NamedTuple):
    """Padded rows; a micro-batch is some of the prompts with all their completions."""

    batch: Batch
    log_probs: dict[str, jax.Array]
    num_micro: int
    has_whole_groups = True

    @property
    def tokens(self) -> PaddedTokens:
        return PaddedTokens(self.batch.completion_mask_PGT > 0)

    @property
    def most_micro(self) -> int:
        return self.num_micro

    @property
    def num_tokens(self) -> jax.Array:
        return jnp.sum(self.batch.attention_mask_PGS > 0, dtype=jnp.float32)

    def part(self, batch: Batch, log_probs, num_parts: int) -> "RowLayout":
        if len(batch.tokens_PGS) % self.num_micro:
            raise ValueError(
                f"num_micro={self.num_micro} must divide the {len(batch.tokens_PGS)} prompts of "
                f"each of the {num_parts} replicas of the parameters (mesh.data)"
            )
        return self._replace(batch=batch, log_probs=log_probs)

    def micro(self, i) -> "RowMicro":
        return RowMicro(self, i)

    def of_micro(self, x_PZ, i):
        """Every `num_micro`-th prompt, from the `i`-th on, so that each device has some of them."""
        return x_PZ.reshape(-1, self.num_micro, *x_PZ.shape[1:])[:, i]

    def loop(self, body, first):
        if self.num_micro == 1:
            carry, out = body(first, 0)
            return carry, jax.tree.map(lambda x: x[None], out)
        return jax.lax.scan(body, first, jnp.arange(self.num_micro))

    def in_layout(self, outs):
        P, G, T = self.batch.completion_mask_PGT.shape
        outs = outs.reshape(self.num_micro, -1, G, T)
        return jnp.moveaxis(outs, 0, 1).reshape(P, G, T)


class RowMicro(NamedTuple):
    """A micro-batch of `RowLayout`: a row is a completion, a place is one of its tokens."""

    layout: RowLayout
    i: jax.Array

    @property
    def tokens(self) -> PaddedTokens:
        return PaddedTokens(self.of(self.layout.batch.completion_mask_PGT) > 0)

    def hidden_and_targets(self, policy: Policy, params):
        batch = self.layout.batch
        S, T = batch.tokens_PGS.shape[-1], batch.num_completion
        tokens = self.of(batch.tokens_PGS).reshape(-1, S)
        mask = self.of(batch.attention_mask_PGS).reshape(-1, S)
        hidden, extras = policy.hidden_and_extras(params, tokens, mask)
        return hidden[:, -T - 1 : -1], tokens[:, -T:], extras

    @property
    def without_experts(self) -> "RowMicro":
        return self  # rows have none

    def of(self, values):
        return self.layout.of_micro(values, self.i)

    def rows(self, values):
        return values.reshape(-1, values.shape[-1])

    def from_rows(self, values):
        _, G, T = self.layout.batch.completion_mask_PGT.shape
        return values.reshape(-1, G, T)

    def prepared(self, prepared: Prepared) -> Prepared:
        return jax.tree.map(self.of, prepared)


class PackedLayout(NamedTuple):
    """Streams of `packing`, side by side over the devices."""

    batch: PackedBatch
    log_probs: dict[str, jax.Array]

    @property
    def has_whole_groups(self) -> bool:
        return self.batch.whole_groups

    @property
    def tokens(self) -> StreamTokens:
        batch = self.batch
        return StreamTokens(batch.trained, batch.completion, batch.num_prompts, batch.group_size)

    @property
    def most_micro(self) -> int:
        return self.batch.trained.shape[1]

    @property
    def num_tokens(self) -> jax.Array:
        return jnp.sum(self.batch.micro.segments > 0, dtype=jnp.float32)

    def part(self, batch: PackedBatch, log_probs, num_parts: int) -> "PackedLayout":
        batch = batch.replace(num_prompts=batch.num_prompts // num_parts)
        return PackedLayout(batch, log_probs)

    def micro(self, i) -> "PackedMicro":
        return PackedMicro(self, i, jax.tree.map(lambda x: x[:, i], self.batch.micro))

    def loop(self, body, first):
        if self.most_micro == 1:
            carry, out = body(first, 0)
            return carry, jax.tree.map(lambda x: x[None], out)

        def step(i, carry_and_outs):
            carry, outs = carry_and_outs
            carry, out = body(carry, i)
            return carry, jax.tree.map(lambda xs, x: xs.at[i].set(x), outs, out)

        _, out = jax.eval_shape(body, first, 0)
        outs = jax.tree.map(lambda s: jnp.zeros((self.most_micro, *s.shape), s.dtype), out)
        # The loop runs the micro-batches that hold something; their number is data, not a shape.
        return jax.lax.fori_loop(0, self.batch.num_micro_B[0], step, (first, outs))

    def in_layout(self, outs):
        return jnp.moveaxis(outs, 0, 1)


class PackedMicro(NamedTuple):
    """A micro-batch of `PackedLayout`: one stream for each batch shard of the mesh."""

    layout: PackedLayout
    i: jax.Array
    streams: Micro

    @property
    def tokens(self) -> StreamTokens:
        return jax.tree.map(self.of, self.layout.tokens)

    def hidden_and_targets(self, policy: Policy, params):
        streams = self.streams
        self.layout.batch.check_starts(policy.config)
        attend = policy.stream_attention(
            Stream(streams.positions, streams.segments, streams.prompts, streams.key_tiles - 1),
            num_prompt=streams.tokens.shape[1] - streams.targets.shape[1],
        )
        hidden, _, extras = policy(
            params, streams.tokens, streams.positions, attend=attend, ffn=self._ffn(policy)
        )
        return self.layout.batch.of_completions(hidden), streams.targets, extras

    @property
    def without_experts(self) -> "PackedMicro":
        batch = self.layout.batch.replace(experts=None)
        return self._replace(layout=self.layout._replace(batch=batch))

    def _ffn(self, policy: Policy):
        """The layers' mixtures, where tokens take the experts that the sampler took."""
        streams, experts = self.streams, self.layout.batch.experts
        m = policy.config.mixture
        if experts is None or not m or experts.shape[-2:] != (policy.config.num_mixtures, m.chosen):
            return policy.ffn(streams.segments)  # another model may have others, or none
        return policy.ffn(streams.segments, experts[:, self.i].astype(jnp.int32) - 1)

    def of(self, values):
        return values[:, self.i]

    def rows(self, values):
        return values

    def from_rows(self, values):
        return values

    def prepared(self, prepared: Prepared) -> Prepared:
        return prepared
