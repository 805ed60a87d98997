"""Long prompts are read in pieces, one between two dispatches, so that others decode meanwhile.

The keys and values of a prompt grow in a store of its own, in which each piece attends to those
before. Meanwhile its request stays in the queue, and others overtake it. When all of it has been
read its samples may start, and their prefix rows are copies of the store. Then the next prompt is
read, so that there is one store at a time. (Read at once, 100,000 tokens keep everyone waiting, and
where attention is not a kernel their scores fit no memory.)

The pieces are those of `past.chunk`. The plain version is `Verbs.prefill`, of the whole prompt.

Letters: S shards, which hold a copy each, T tokens of a piece, C columns of the store.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.engine import kv_cache
from adpo_jax.engine import past as past_lib
from adpo_jax.engine.decode_state import Prefixes, Sizes
from adpo_jax.engine.kv_cache import KV
from adpo_jax.engine.past import Chunks
from adpo_jax.engine.requests import Request
from adpo_jax.engine.sizes import (
    MIN_BUCKET,
    is_power_of_two,
    is_whole,
    length_bucket,
    power_of_two,
)
from adpo_jax.engine.verbs import Verbs

# A piece has no fewer tokens than these because more of them would make too many scores.
LEAST_PIECE = 64


def check_size(size: int):
    """Checks the tokens of a piece.

    Raises:
      ValueError: for none that is a power of two.
    """
    least = MIN_BUCKET
    if not (is_power_of_two(size, least=least) or (is_whole(size) and size == 0)):
        raise ValueError(
            f"prefill_chunk_size is a power of two, {least} or more, or 0 for prompts that are "
            f"prefilled at once; given {size!r}"
        )


def shapes(verbs: Verbs, size: int, length: int) -> list[tuple[int, int]]:
    """(tokens of a piece, columns of the store) of the pieces of a prompt, each once, in order."""
    found, at = {}, 0
    while at < length:
        T, columns = _shape(verbs, size, at, length - at)
        found[T, columns] = None
        at += T
    return list(found)


def pieces_of(verbs: Verbs, size: int, request: Request) -> list[tuple[int, int]]:
    """`shapes` of the prompt of a request; none where it is prefilled at once."""
    return shapes(verbs, size, _length(request)) if in_pieces(request, size) else []


def _shape(verbs: Verbs, size: int, at: int, left: int) -> tuple[int, int]:
    """The tokens of the piece at a place, which make no more scores than there may be, and the
    columns of the store that it is written into, which never become fewer."""
    T = length_bucket(min(left, size), size)
    while True:
        columns = max(size, power_of_two(at + T))
        scores = T * verbs.policy.config.num_heads * (columns + T)
        if T <= LEAST_PIECE or scores <= past_lib.CHUNK_SCORES:
            return T, columns
        T //= 2


def _chunks(num_shards: int, tokens: np.ndarray, T: int, at: int) -> Chunks:
    """Tokens as one piece of T places on each shard."""
    padded = np.zeros((num_shards, T), np.int32)
    padded[:, : len(tokens)] = tokens
    counts, places, zeros = (np.full(num_shards, n, np.int32) for n in (len(tokens), at, 0))
    return Chunks(padded, counts, places, zeros, np.arange(num_shards, dtype=np.int32), zeros)


def trace(verbs: Verbs, params, size: int, length: int, num_shards: int) -> jax.stages.Traced:
    """The program of the piece of a prompt that makes most scores, from shapes alone."""
    T, columns = max(shapes(verbs, size, length), key=lambda shape: shape[0] * sum(shape))
    chunks = _plain(_chunks(num_shards, np.zeros(0, np.int32), T, 0))
    return past_lib.chunk.trace(verbs, params, None, _store(verbs, num_shards, columns), chunks)


def compile_piece(verbs: Verbs, params, T: int, columns: int):
    """Compiles what reads such a piece on one device, from shapes alone."""
    store = _plain(_store(verbs, 1, columns))
    chunks = _chunks(1, np.zeros(0, np.int32), T, 0)
    lowered = past_lib.chunk.lower(verbs, params, None, store, chunks)
    lowered.compile()
    piece = _plain(lowered.out_info)
    _written.lower(verbs, store, piece, np.int32(0)).compile()
    Verbs.with_columns.lower(verbs, store, 2 * columns).compile()


def _plain(tree):
    """The shapes of a tree, without shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _store(verbs: Verbs, num_shards: int, columns: int) -> KV:
    """The shapes of a store."""
    least, S = MIN_BUCKET, num_shards
    sizes = Sizes(slots=S, columns=least, rows=S, width=1, prefix=columns)
    return verbs.abstract_state(sizes).prefix.kv


def compile_copies(verbs: Verbs, columns: int, length: int) -> Prefixes:
    """Compiles the copying of a prompt out of a store of so many columns, on one device.

    Args:
      length: the columns of what it is copied into.

    Returns:
      The shapes of the copy.
    """
    lowered = Verbs.with_columns.lower(verbs, _plain(_store(verbs, 1, columns)), length)
    lowered.compile()
    prefixes = _plain(Prefixes(lowered.out_info, jax.ShapeDtypeStruct((1,), jnp.int32)))
    Verbs.rows_of.lower(verbs, prefixes, np.zeros(1, np.int32)).compile()
    return prefixes


def in_pieces(request: Request, size: int) -> bool:
    """Whether the prompt of a request is read in pieces of at most `size` tokens; 0 reads none."""
    # A piece does not tell which experts its tokens went through.
    return 0 < size < len(request.prompt) - 1 and not request.sampling.prompt_experts


@dataclasses.dataclass
class _Reading:
    """What has been read of a prompt: so many tokens, whose keys and values are S equal rows.

    `version` is that of the parameters that began to read it.
    """

    store: KV
    version: int
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

    def in_pieces(self, request: Request) -> bool:
        return in_pieces(request, self._size)

    def is_ready(self, request: Request) -> bool:
        """Whether its samples may start: its prompt has been read, or is prefilled at once."""
        if not self.in_pieces(request):
            return True
        reading = self._readings.get(request)
        return reading is not None and reading.done == _length(request)

    def version(self, request: Request) -> int:
        """The version of the parameters that began to read its prompt."""
        return self._readings[request].version

    def go_on(self, params, request: Request, version: int) -> int:
        """Reads the next piece of a prompt; returns the number of its tokens.

        Args:
          version: the number of the parameters.
        """
        verbs, S, reading = self._verbs, self._num_shards, self._readings.get(request)
        if reading is None:
            reading = _Reading(past_lib.empty(verbs, S, self._size), version)
            self._readings[request] = reading
        at, left = reading.done, _length(request) - reading.done
        T, columns = _shape(verbs, self._size, at, left)
        store = past_lib.resized(verbs, reading.store, None, columns)
        reading.store = None  # it is donated
        count = min(T, left)
        chunks = _chunks(S, request.prompt[at : at + count], T, at)
        piece = past_lib.chunk(verbs, params, None, store, chunks)
        reading.store = _written(verbs, store, piece, np.int32(at))
        reading.done += count
        return count

    def prefixes(self, request: Request, columns: int) -> Prefixes:
        """A prompt that has been read, S equal rows with so many columns, which hold all of it."""
        kv = self._verbs.with_columns(self._readings[request].store, columns)
        return Prefixes(kv, np.full(self._num_shards, _length(request), np.int32))

    def let_go(self, queued: Iterable[Request]):
        """Frees what was read of requests that are not in the queue any more."""
        if self._readings:
            self._readings = {r: self._readings[r] for r in queued if r in self._readings}


def _length(request: Request) -> int:
    """Tokens to read: all but the last, which each sample feeds itself."""
    return len(request.prompt) - 1


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _written(verbs: Verbs, store: KV, piece: KV, at: jax.Array) -> KV:
    """The store with a piece [S, T] from column `at` on; its padding is written over, or unseen."""
    layout = verbs.layout

    def write(stored, new, axis):
        if axis == kv_cache.NO_COLUMNS:
            return new
        return jax.lax.dynamic_update_slice_in_dim(stored, new, at, axis)

    return verbs.sharded(jax.tree.map(write, store, piece, layout.axes(store)))
