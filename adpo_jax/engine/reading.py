"""Long prompts are read in pieces, one between two dispatches, so that others decode meanwhile.

The keys and values of a prompt grow in a store of its own, in which each piece attends to those
before. Meanwhile its request stays in the queue, and others overtake it. When all of it has been
read its samples may start, and their prefix rows are copies of the store. (Read at once, 100,000
tokens keep everyone waiting, and where attention is not a kernel their scores fit no memory.)

The pieces are those of `past.chunk`. The plain version is `Verbs.prefill`, of the whole prompt.

Letters: S shards, which hold a copy each, T tokens of a piece, C columns of the store.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.engine import kv_cache
from adpo_jax.engine import past as past_lib
from adpo_jax.engine import schedule as schedule_lib
from adpo_jax.engine.kv_cache import KV
from adpo_jax.engine.past import Chunks
from adpo_jax.engine.verbs import Prefixes, Verbs
from adpo_jax.model.model_config import ModelConfig

if TYPE_CHECKING:
    from adpo_jax.engine.batching import Request

# A piece has no fewer tokens than these because more of them would make too many scores.
LEAST_PIECE = 64


def check_size(size: int, config: ModelConfig):
    """Checks the tokens of a piece.

    Raises:
      ValueError: for none that is a power of two, or a model that has no pieces.
    """
    least = schedule_lib.MIN_BUCKET
    if size and not (size >= least and size & (size - 1) == 0):
        raise ValueError(
            f"prefill_chunk_size is a power of two, {least} or more, or 0 for prompts that are "
            f"prefilled at once; given {size!r}"
        )
    if size and config.linear_attention:
        raise ValueError(
            "prefill_chunk_size reads prompts in pieces, and the state of linear attention is made "
            "at once: leave it 0 for this model"
        )


def trace(verbs: Verbs, params, size: int, columns: int, num_shards: int) -> jax.stages.Traced:
    """The program of the last piece of a prompt of so many columns, from shapes alone."""
    S, T = num_shards, _fitting(verbs, size, columns)
    store = verbs.abstract_state(S, schedule_lib.MIN_BUCKET, S, columns, 1).prefix.kv
    chunks = Chunks(np.zeros((S, T), np.int32), *np.zeros((5, S), np.int32))
    chunks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), chunks)
    return past_lib.chunk.trace(verbs, params, None, store, chunks)


def _fitting(verbs: Verbs, T: int, columns: int) -> int:
    """The tokens of a piece, at most T, that make no more scores than there may be."""
    scores = verbs.policy.config.num_heads * (columns + T)
    while T > LEAST_PIECE and T * scores > past_lib.CHUNK_SCORES:
        T //= 2
    return T


def in_pieces(request: "Request", size: int) -> bool:
    """Whether the prompt of a request is read in pieces of at most `size` tokens; 0 reads none."""
    # A piece does not tell which experts its tokens went through.
    return 0 < size < len(request.prompt) - 1 and not request.sampling.prompt_experts


@dataclasses.dataclass
class _Reading:
    """What has been read of a prompt: so many tokens, whose keys and values are S equal rows."""

    store: KV
    done: int = 0


class Reader:
    """Reads the prompts of requests that wait in the queue.

    Args:
      size: the most tokens of a piece, a power of two; prompts that have no more are prefilled at
        once, all of them where it is 0.
    """

    def __init__(self, verbs: Verbs, size: int, num_shards: int):
        self._verbs, self._size, self._num_shards = verbs, size, num_shards
        self._readings: dict[Request, _Reading] = {}

    def in_pieces(self, request: "Request") -> bool:
        return in_pieces(request, self._size)

    def is_ready(self, request: "Request") -> bool:
        """Whether its samples may start: its prompt has been read, or is prefilled at once."""
        if not self.in_pieces(request):
            return True
        reading = self._readings.get(request)
        return reading is not None and reading.done == _length(request)

    def go_on(self, params, request: "Request") -> int:
        """Reads the next piece of a prompt; returns the number of its tokens."""
        verbs, S, reading = self._verbs, self._num_shards, self._readings.get(request)
        if reading is None:
            reading = _Reading(past_lib.empty(verbs, S, self._size))
            self._readings[request] = reading
        at, left = reading.done, _length(request) - reading.done
        T = schedule_lib.length_bucket(min(left, self._size), self._size)
        columns = max(self._size, schedule_lib.power_of_two(at + T))
        T = _fitting(verbs, T, columns)
        store = past_lib.resized(verbs, reading.store, None, columns)
        reading.store = None  # it is donated
        count = min(T, left)
        tokens, rows = np.zeros((S, T), np.int32), np.arange(S, dtype=np.int32)
        tokens[:, :count] = request.prompt[at : at + count]
        counts, places, zeros = (np.full(S, n, np.int32) for n in (count, at, 0))
        chunks = Chunks(tokens, counts, places, zeros, rows, zeros)
        piece = past_lib.chunk(verbs, params, None, store, chunks)
        reading.store = _written(verbs, store, piece, np.int32(at))
        reading.done += count
        return count

    def prefixes(self, request: "Request", columns: int) -> Prefixes:
        """A prompt that has been read, S equal rows with so many columns, which hold all of it."""
        kv = self._verbs.with_columns(self._readings[request].store, columns)
        return Prefixes(kv, jnp.full(self._num_shards, _length(request), jnp.int32))

    def let_go(self, queued: Iterable["Request"]):
        """Frees what was read of requests that are not in the queue any more."""
        if self._readings:
            self._readings = {r: self._readings[r] for r in queued if r in self._readings}


def _length(request: "Request") -> int:
    """Tokens to read: all but the last, which each sample feeds itself."""
    return len(request.prompt) - 1


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _written(verbs: Verbs, store: KV, piece: KV, at: jax.Array) -> KV:
    """The store with a piece [S, T] from column `at` on; its padding is written over, or unseen."""
    axes = jax.tree.map(lambda axis: axis + verbs.lead, verbs.layout.column_axes())

    def write(stored, new):
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda x, y, axis: put(x, y, at, axis), stored, new, axes)

    return verbs.sharded(jax.tree.map(write, store, piece, is_leaf=kv_cache.is_layers))
