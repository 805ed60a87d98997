"""The state of decoding, and what a call returns.

Letters: B slots, P prefix rows, M samples of a prefix row, S past rows, N pages of a slot, C
columns of the ring, T tokens, A alternatives, L layers with a mixture, k experts of a token.
"""

from typing import NamedTuple

import jax
import numpy as np

from adpo_jax.engine.group_attention import PastView
from adpo_jax.engine.kv_cache import KV, PageSizes
from adpo_jax.engine.sampling import Alternatives


class Sizes(NamedTuple):
    """The sizes of a decode state."""

    slots: int
    columns: int  # of the ring
    rows: int  # prefix rows
    width: int  # the most samples of a prefix row
    prefix: int  # tokens of a prefix row
    past_rows: int = 0
    past: int = 0  # columns of a past row
    pages: PageSizes | None = None  # None where the ring holds the longest completion

    def moves(self, old: "Sizes") -> bool:
        """Whether slots or prefix rows move into others when these sizes follow the old ones."""
        return (self.slots, self.rows, self.width) != (old.slots, old.rows, old.width)


class Prefixes(NamedTuple):
    """Keys and values of some prompts without their last token.

    experts, where asked for, are [rows, T, L, k]: those that each token went through.
    """

    kv: KV
    lengths: jax.Array  # [rows] int32
    experts: jax.Array | None = None  # of the dtype of `ResultTokens.experts`


class Slots(NamedTuple):
    """The state of each slot's sample, [B] each."""

    token: jax.Array  # int32, the next to feed
    position: jax.Array  # int32, of that token in its sequence
    generated: jax.Array  # int32, tokens of the completion so far
    active: jax.Array  # bool
    row: jax.Array  # int32, prefix row of its prompt
    rank: jax.Array  # int32, its place among the samples of that row
    key_data: jax.Array  # [B, 2] uint32, of its sample
    # int32, tokens of the completion that do not lie in the ring: from before it took this slot, or
    # in pages; None where that is 0 in all slots
    before: jax.Array | None = None


class Past(NamedTuple):
    """The completions of samples from before they took their slots, one row a sample."""

    kv: KV  # [S rows, columns]
    view: PastView


class Pages(NamedTuple):
    """The tokens of samples that left the ring, in pages of a pool."""

    kv: KV  # [pages, columns of a page]
    table: jax.Array  # [B, N] int32, the pages of each slot


class DecodeState(NamedTuple):
    """Everything that decoding keeps between calls."""

    ring: KV  # [B rows, C columns]
    prefix: Prefixes  # [P rows, T columns]
    slots: Slots
    members: jax.Array  # [P, M] int32, the slot of each sample of a prefix row; 0 where none
    column: jax.Array  # int32 scalar, of the ring, where the next token goes
    past: Past | None = None  # None where all samples began in their slots
    pages: Pages | None = None  # None where the ring holds the longest completion


class ResultTokens(NamedTuple):
    """The tokens that some steps sampled, [steps, B] each; alternatives [steps, B, A].

    experts, where asked for, are [steps, B, L, k]: those that each token went through in the L
    layers with a mixture when its successor was sampled.
    """

    tokens: jax.Array  # int32
    log_probs: jax.Array  # float32
    full_log_probs: jax.Array | None  # float32
    alternatives: Alternatives | None
    valid: jax.Array  # bool, the slot was active
    stopped: jax.Array  # bool, by a stop token
    experts: jax.Array | None = None  # uint8, or uint16 where there are more than 256


def age(slots: Slots) -> jax.Array:
    """[B] int32, the tokens that each slot's sample has in the ring."""
    return slots.generated if slots.before is None else slots.generated - slots.before


def with_before(slots: Slots) -> Slots:
    """The slots, which from now on say how many tokens samples have outside the ring."""
    if slots.before is not None:
        return slots
    return slots._replace(before=np.zeros(slots.token.shape, np.int32))
