"""What a batch keeps of its samples outside the ring, and what it does with it.

A `Keeper` keeps nothing. `past_rows.PastKeeper` keeps what samples in turns have in past rows,
`pages.Pager` in pages, and also what has left a ring that is short.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from adpo_jax.engine.decode_state import DecodeState, Sizes
from adpo_jax.engine.kv_cache import KV
from adpo_jax.engine.past import Piece
from adpo_jax.engine.requests import Sample
from adpo_jax.engine.schedule import Start

# A function from a store, pieces for it and the most tokens that are prefilled at once for a sample
# to the store with these pieces.
Prefill = Callable[[KV, list[Piece], int], KV]


class EndedTurn(NamedTuple):
    """A turn that has ended, and whose keys and values lie in the ring alone."""

    sample: Sample
    slot: int
    first: int  # column of the ring
    count: int  # columns


class Keeper:
    """Keeps nothing; those that keep something override what they do otherwise.

    Attributes:
      copies_ring: whether tokens are copied out of the ring, which must not lose them before.
      longest: tokens of the longest completion that lies in past rows, or will; 0 for none.
      num_evicted: samples whose memory others took while they waited.
    """

    copies_ring = False
    longest = num_evicted = 0

    def expect(self, num_tokens: int):
        """Notes that a sample of so many tokens will be kept."""

    def try_begin(self, sample: Sample, shard: int) -> bool:
        """Takes the memory that a sample needs to start in a shard.

        Returns:
          Whether there was enough.
        """
        return True

    def refilled(
        self, state: DecodeState, starts: Sequence[Start], prefill: Prefill
    ) -> DecodeState:
        """The state with all that the starting samples have had so far.

        Args:
          prefill: prefills what is not kept of it.
        """
        return state

    def started(self, state: DecodeState, starts: Sequence[Start]) -> DecodeState:
        """The state whose tables know the starting samples too."""
        return state

    def remember(self, sample: Sample, tokens: np.ndarray):
        """Notes the new tokens of a sample that decodes on."""

    def leave_ring(self, state: DecodeState, written: int) -> tuple[DecodeState, list[int]]:
        """Moves tokens out of the ring, which is nearly full.

        Args:
          written: steps since the ring began at its first column.

        Returns:
          The state, and the slots whose samples gave them up since there was no memory for them.
        """
        return state, []

    def pause(self, sample: Sample):
        """Lets others take the memory of a sample that has given up its slot."""

    def keep(self, state: DecodeState, ended: Sequence[EndedTurn]) -> DecodeState:
        """Copies turns that have ended out of the ring to where they stay."""
        return state

    def release(self, sample: Sample):
        """Frees what is kept for a sample."""

    def resized(self, state: DecodeState, now: Sizes, sizes: Sizes) -> DecodeState:
        """The state, whose ring and prefix rows have these sizes already, with what is kept."""
        return state


def missing(
    sample: Sample, shard: int, row: int, prefix_row: int, table: np.ndarray | None = None
) -> list[Piece]:
    """The tokens of a sample that are not kept yet, as one piece, or none; then they are kept.

    The column of a token is filled when the token before it is fed.

    Args:
      row, prefix_row, table: as of `Piece`.
    """
    prompt, at = sample.request.prompt, sample.in_past
    if sample.num_tokens <= at:
        return []
    sample.in_past = sample.num_tokens
    fed = np.concatenate([prompt[-1:], sample.completion[:-1]])[at:]
    return [Piece(shard, fed, at, len(prompt) - 1, row, prefix_row, table)]


def first_to_lose(idle: Sequence[Sample]) -> Sample:
    """Which of the samples without a slot loses its memory first.

    Those that wait for a tool come first, and of them the one that has waited longest; then the
    last of those that wait for a slot.

    Args:
      idle: the one that paused first first.
    """
    return next((sample for sample in idle if sample.ended), idle[-1])
