"""How a completion is sampled: the settings, and one token from one row of logits.

No noise is drawn over the vocabulary and nothing is sorted. A token is found by inverting the
cumulative distribution with two uniforms a row: one picks a block of the vocabulary, the other a
token within it. On a CPU this costs 1/28 of Gumbel noise over [B, V]. Top-k and top-p are
thresholds on the logits, found exactly by bisecting the 32 bits of a float.

A sample does not depend on the samples beside it. Its key is made of the prompt's tokens and its
number among the prompt's samples, its uniforms of that key and the position.

Letters: B rows, P prompts, V vocabulary, N blocks of the vocabulary, W tokens of a block.
"""

import dataclasses
import functools
import numbers
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from adpo_jax.devices.sharding import axes_that_split
from adpo_jax.engine.sizes import is_whole, up_to_multiple
from adpo_jax.records import copy_numbers

# Tokens of a block of the vocabulary. 128 divides most vocabularies and is a vector register's
# multiple everywhere; 152k tokens make 1,187 blocks.
BLOCK = 128


# A lower temperature is taken as greedy: the quotient of a logit would soon be infinite.
LEAST_TEMPERATURE = 1e-3
# The largest int32, in which a device counts.
LARGEST = 2**31 - 1


def _listed(name: str, values: Any, kind: type, what: str) -> tuple:
    """Values as a tuple; none for None.

    Raises:
      ValueError: for what is no list of values of this kind.
    """
    try:
        found = () if values is None else tuple(values)
    except TypeError:
        found = (None,)
    if not all(isinstance(value, kind) for value in found):
        raise ValueError(f"{name} is a list of {what}; given {values!r:.100}")
    return found


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled and when they end.

    Attributes:
      n: completions of each prompt.
      temperature: divides the logits; below `LEAST_TEMPERATURE` it is greedy.
      top_k: keep the k most likely tokens (and ties with the last of them); -1 keeps all.
      top_p: keep the fewest tokens whose mass, among those top_k kept, reaches top_p; 1 keeps all.
      min_p: drop tokens less likely than min_p times the most likely one; 0 keeps all.
      max_tokens: length limit of a completion, its stop token included.
      min_tokens: stop tokens cannot be sampled before this many tokens. A stop string that is
        complete earlier ends the completion at this many tokens.
      stop_token_ids: any of these tokens ends a completion, and is its last token.
      stop: the token that completes any of these strings, in the text that the engine's
        `detokenize` makes, ends a completion.
      ignore_eos: whether stop tokens end no completion.
      full_log_probs: whether to return also log-probs over the whole vocabulary, tempered but not
        truncated; the stop tokens that `min_tokens` holds back count as part of it.
      routed_experts: whether to return also the experts that each token went through.
      prompt_experts: whether to return also those of the prompt's tokens, where it is prefilled.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    full_log_probs: bool = False
    routed_experts: bool = False
    prompt_experts: bool = False

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", _listed("stop", stop, str, "strings"))
        ids = _listed("stop_token_ids", self.stop_token_ids, numbers.Integral, "token ids")
        self._set("stop_token_ids", tuple(int(i) for i in ids))
        for name in ("n", "top_k", "max_tokens", "min_tokens"):
            value = getattr(self, name)
            if not is_whole(value):
                raise ValueError(f"{name} is a whole number; given {value!r}")
            if value > LARGEST:
                raise ValueError(f"{name} is at most {LARGEST}; given {value}")
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), numbers.Real):
                raise ValueError(f"{name} is a number; given {getattr(self, name)!r}")
        for name in ("ignore_eos", "full_log_probs", "routed_experts", "prompt_experts"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} is True or False; given {getattr(self, name)!r}")
        rules = {
            "n": (self.n >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more, and finite"),
            "top_k": (self.top_k == -1 or self.top_k >= 1, "-1 (off) or at least 1"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (
                0 <= self.min_tokens <= self.max_tokens,
                f"in [0, max_tokens={self.max_tokens}]",
            ),
            "stop": (all(self.stop), "strings that are not empty"),
            "stop_token_ids": (
                all(0 <= i <= LARGEST for i in self.stop_token_ids),
                f"token ids, 0 to {LARGEST}",
            ),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {wanted}; given {getattr(self, name)!r}")

    def _set(self, name: str, value: tuple) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def method(self) -> "Method":
        """The part of the settings that changes the compiled program."""
        return Method(
            greedy=self.greedy,
            top_k=not self.greedy and self.top_k > 0,
            top_p=not self.greedy and self.top_p < 1,
            min_p=not self.greedy and self.min_p > 0,
            min_tokens=self.min_tokens > 0,
            full_log_probs=self.full_log_probs,
            routed_experts=self.routed_experts,
        )

    def knobs(self) -> "Knobs":
        """The part of the settings that does not change the compiled program."""
        stop_ids = () if self.ignore_eos else self.stop_token_ids
        # The length is a multiple of 8, so that adding a stop token rarely changes a shape.
        padded = np.full(max(8, up_to_multiple(len(stop_ids), 8)), -1, np.int32)
        padded[: len(stop_ids)] = stop_ids
        return Knobs(
            greedy=np.bool_(self.greedy),
            temperature=np.float32(1.0 if self.greedy else self.temperature),
            top_k=np.int32(-1 if self.greedy else self.top_k),
            top_p=np.float32(1.0 if self.greedy else self.top_p),
            min_p=np.float32(0.0 if self.greedy else self.min_p),
            min_tokens=np.int32(self.min_tokens),
            max_tokens=np.int32(self.max_tokens),
            stop_ids=padded,
        )


@dataclasses.dataclass(frozen=True)
class Method:
    """Which steps of sampling are compiled in.

    Attributes:
      mixed: whether some rows are greedy and others are not, as `Knobs.greedy` says.
      num_alternatives: how many of the likeliest tokens of each row to return too.
    """

    greedy: bool = False
    mixed: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    min_tokens: bool = False
    full_log_probs: bool = False
    routed_experts: bool = False
    num_alternatives: int = 0

    @property
    def truncates(self) -> bool:
        return self.top_k or self.top_p or self.min_p


class Knobs(NamedTuple):
    """The numbers of `SamplingParams` as arrays, which are arguments of the compiled program.

    Each is one number for all rows, as listed here, or one a row, with a leading axis [B].
    """

    greedy: Any  # bool scalar, read where the method is mixed
    temperature: Any  # float32 scalar, > 0
    top_k: Any  # int32 scalar
    top_p: Any  # float32 scalar
    min_p: Any  # float32 scalar
    min_tokens: Any  # int32 scalar
    max_tokens: Any  # int32 scalar
    stop_ids: Any  # [?] int32, padded with -1


class Sampled(NamedTuple):
    """One token of every row."""

    tokens: jax.Array  # [B] int32
    log_probs: jax.Array  # [B] float32, under the distribution sampled from; greedy: see `sample`
    full_log_probs: jax.Array | None  # [B] float32, tempered and not truncated
    alternatives: "Alternatives | None" = None


class Alternatives(NamedTuple):
    """The likeliest tokens of every row, the likeliest first."""

    tokens: jax.Array  # [B, A] int32
    log_probs: jax.Array  # [B, A] float32, as those of the sampled token; -inf where truncated


@jax.jit
def _fold_in_all(key, uids, samples):
    def of_sample(uid, sample):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, uid), sample))

    return jax.vmap(jax.vmap(of_sample, (None, 0)), (0, None))(uids, samples)


def prompt_uids(
    prompts: Sequence[Sequence[int]], copies: Sequence[int] | None = None
) -> np.ndarray:
    """A number for each prompt that does not depend on its place in the list, [P] uint32.

    It is a hash of the tokens and of its number among equal prompts.

    Args:
      copies: these numbers, where the prompts are a part of a list; None to count.
    """
    copies = copy_numbers(prompts) if copies is None else copies
    uids = [
        zlib.crc32(copy.to_bytes(4, "little"), zlib.crc32(np.asarray(prompt, "<i4").tobytes()))
        for prompt, copy in zip(prompts, copies, strict=True)
    ]
    return np.array(uids, np.uint32)


def sample_keys(key: jax.Array, uids: np.ndarray, n: int) -> jax.Array:
    """The keys of n samples of each prompt, [P, n, 2] uint32.

    Args:
      uids: [P] uint32, a number for each prompt (`prompt_uids`).
    """
    return _fold_in_all(threefry(key), uids, np.arange(n, dtype=np.uint32))


def threefry(key: jax.Array) -> jax.Array:
    """The key itself, or a threefry key made of the bits of another kind, such as rbg's four."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    derived = jax.random.wrap_key_data(data[:2], impl="threefry2x32")
    for word in data[2:]:
        derived = jax.random.fold_in(derived, word)
    return derived


def uniforms(key_data: jax.Array, position: jax.Array) -> jax.Array:
    """Two uniforms in [0, 1) for each sample, from its key and position alone.

    Args:
      key_data: [B, 2] uint32, the key of each sample.
      position: [B] int32, tokens of the completion before this one.

    Returns:
      [B, 2] float32.
    """

    def of_row(data, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), position)
        return jax.random.uniform(key, (2,), jnp.float32)

    return jax.vmap(of_row)(key_data, position)


def sample(
    logits: jax.Array,
    uniform: jax.Array,
    generated: jax.Array,
    knobs: Knobs,
    method: Method,
    mesh: Mesh | None = None,
) -> Sampled:
    """Samples one token of every row.

    Log-probs of greedy tokens are those of the softmax at temperature 1, since the point mass that
    a greedy row samples from would make them 0.

    Args:
      logits: [B, V] float32.
      uniform: [B, 2] float32 in [0, 1).
      generated: [B] int32, tokens of the completion before this one (for `min_tokens`); what a tool
        answered counts too.
      mesh: where it splits the vocabulary, no device gathers the logits (but for alternatives).
    """
    split_by = axes_that_split(mesh, "vocab", logits.shape[1])
    kept = logits = logits / _by_row(knobs.temperature)
    if method.min_tokens:
        too_young = (generated < knobs.min_tokens)[:, None]
        kept = jnp.where(too_young, without(kept, knobs.stop_ids), kept)
    if method.truncates:
        kept = truncate(kept, knobs, method)
    top = jnp.max(kept, axis=-1)
    if method.greedy:
        tokens = first_equal(kept, top)
        log_z = top + jnp.log(jnp.sum(jnp.exp(kept - top[:, None]), axis=-1))
    else:
        draw = functools.partial(split_inverse_cdf, mesh=mesh) if split_by else inverse_cdf
        tokens, log_z = draw(kept, top, uniform)
        if method.mixed:
            tokens = jnp.where(knobs.greedy, first_equal(kept, top), tokens)
    if split_by:
        is_chosen = tokens[:, None] == jnp.arange(logits.shape[1], dtype=jnp.int32)
        chosen = jnp.sum(jnp.where(is_chosen, logits, 0.0), axis=1)
    else:
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    full = None
    if method.full_log_probs:
        full = chosen - (log_z if kept is logits else jax.nn.logsumexp(logits, axis=-1))
    alternatives = None
    if method.num_alternatives:
        likeliest, ids = jax.lax.top_k(kept, min(method.num_alternatives, kept.shape[-1]))
        alternatives = Alternatives(ids.astype(jnp.int32), likeliest - log_z[:, None])
    return Sampled(tokens, chosen - log_z, full, alternatives)


def _by_row(knob):
    """A knob, one for all rows or one a row, in a shape that broadcasts against [B, V]."""
    return jnp.reshape(knob, (-1, 1))


def without(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits [B, V] with those of `ids` ([S], or [B, S]) at -inf; ids of -1 are skipped."""
    B, V = logits.shape
    ids = jnp.broadcast_to(jnp.where(ids < 0, V, ids), (B, ids.shape[-1]))
    rows = jnp.arange(B)[:, None]
    banned = jnp.zeros((B, V), bool).at[rows, ids].set(True, mode="drop")
    return jnp.where(banned, -jnp.inf, logits)


def first_equal(x: jax.Array, value: jax.Array) -> jax.Array:
    """The first column of each row that equals `value`: argmax as two plain reductions."""
    V = x.shape[-1]
    columns = jnp.where(x == value[:, None], jnp.arange(V, dtype=jnp.int32), V)
    return jnp.minimum(jnp.min(columns, axis=-1), V - 1)


def inverse_cdf(logits: jax.Array, top: jax.Array, uniform: jax.Array):
    """A token of softmax(logits) by inverting its cumulative distribution.

    Args:
      logits: [B, V] float32, -inf where nothing may be sampled.
      top: [B] their maxima, finite.

    Returns:
      tokens [B] int32 and log Z [B] float32, the log-sum-exp of the logits.
    """
    B, V = logits.shape
    blocks, width = vocabulary_blocks(V)
    if blocks * width > V:
        logits = jnp.pad(logits, ((0, 0), (0, blocks * width - V)), constant_values=-jnp.inf)
    logits_BNW = logits.reshape(B, blocks, width)
    mass_BN = jnp.sum(jnp.exp(logits_BNW - top[:, None, None]), axis=-1)
    block = pick(mass_BN, uniform[:, 0])
    within_BW = jnp.take_along_axis(logits_BNW, block[:, None, None], axis=1)[:, 0]
    token = block * width + pick(jnp.exp(within_BW - top[:, None]), uniform[:, 1])
    # NaN logits would give an index behind the last token.
    return jnp.minimum(token, V - 1), top + jnp.log(jnp.sum(mass_BN, axis=-1))


def split_inverse_cdf(logits: jax.Array, top: jax.Array, uniform: jax.Array, mesh: Mesh):
    """`inverse_cdf` where the mesh splits the vocabulary: masses of blocks travel, logits do not.

    A block may lie on two devices. Each has its part of the block's mass, and -inf for the rest.
    """
    B, V = logits.shape
    blocks, width = vocabulary_blocks(V)
    rows, vocab = axes_that_split(mesh, "batch", B), axes_that_split(mesh, "vocab", V)

    def local(logits, top, uniform):
        B, here = logits.shape
        first_block, skipped = jnp.divmod(jax.lax.axis_index(vocab) * here, width)
        touched = -(-(here + width - 1) // width)
        aligned = jnp.full((B, touched * width), -jnp.inf, logits.dtype)
        aligned = jax.lax.dynamic_update_slice(aligned, logits, (0, skipped))
        logits_BNW = aligned.reshape(B, touched, width)
        mine_BN = jnp.sum(jnp.exp(logits_BNW - top[:, None, None]), axis=-1)
        mass_BN = jnp.zeros((B, blocks + touched), mine_BN.dtype)
        mass_BN = jax.lax.dynamic_update_slice(mass_BN, mine_BN, (0, first_block))
        mass_BN = jax.lax.psum(mass_BN[:, :blocks], vocab)
        block = pick(mass_BN, uniform[:, 0])
        at = block - first_block
        within_BW = jnp.take_along_axis(logits_BNW, at[:, None, None], axis=1, mode="clip")[:, 0]
        is_here = (at >= 0) & (at < touched)
        within_BW = jax.lax.pmax(jnp.where(is_here[:, None], within_BW, -jnp.inf), vocab)
        token = block * width + pick(jnp.exp(within_BW - top[:, None]), uniform[:, 1])
        return jnp.minimum(token, V - 1), top + jnp.log(jnp.sum(mass_BN, axis=-1))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(rows, vocab), PartitionSpec(rows), PartitionSpec(rows)),
        out_specs=PartitionSpec(rows),
        check_vma=False,
    )(logits, top, uniform)


def vocabulary_blocks(V: int) -> tuple[int, int]:
    """(blocks, tokens of a block): how a vocabulary is divided for the search."""
    width = BLOCK if V > 2 * BLOCK else V
    return -(-V // width), width


def pick(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """An index of each row of `mass` [B, N] with probability in proportion to it.

    Rounding at the ends of the cumulative sum could pick an entry without mass; the entry with the
    largest mass is taken then.
    """
    cumulative = jnp.cumsum(mass, axis=-1)
    below = cumulative <= (uniform * cumulative[:, -1])[:, None]
    index = jnp.minimum(jnp.sum(below, axis=-1, dtype=jnp.int32), mass.shape[-1] - 1)
    has_mass = jnp.take_along_axis(mass, index[:, None], axis=1)[:, 0] > 0
    return jnp.where(has_mass, index, first_equal(mass, jnp.max(mass, axis=-1)))


def truncate(logits: jax.Array, knobs: Knobs, method: Method) -> jax.Array:
    """Logits [B, V] with the tokens outside top-k, top-p and min-p at -inf.

    They apply in this order, each to the tokens that the one before kept. Tokens that tie with the
    last one kept stay.
    """
    if method.top_k:
        V = logits.shape[-1]
        k = jnp.where(knobs.top_k < 0, V, jnp.minimum(knobs.top_k, V))
        logits = keep_largest(logits, lambda at_least: jnp.sum(at_least, axis=-1) >= k)
    if method.top_p:
        probs = jax.nn.softmax(logits, axis=-1)
        # The sum over all tokens may round to a little less than 1.
        enough = knobs.top_p * jnp.sum(probs, axis=-1)
        # A row that keeps all tokens has an infinite bound, which no set of tokens reaches.
        enough = jnp.where(knobs.top_p < 1, enough, jnp.inf)
        logits = keep_largest(
            logits, lambda at_least: jnp.sum(jnp.where(at_least, probs, 0), axis=-1) >= enough
        )
    if method.min_p:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(_by_row(knobs.min_p))
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def keep_largest(logits: jax.Array, enough) -> jax.Array:
    """Keeps the fewest of the largest logits of a row that are `enough`; the others become -inf.

    The threshold is bisected over the 32 bits of a float, whose order as integers is the order of
    the floats. This is exact, and takes 32 sums over the vocabulary; a sort takes some hundred
    passes.

    Args:
      logits: [B, V] float32.
      enough: [B, V] bool, whether each token is kept -> [B] bool. It is true when all tokens are
        kept, and stays true when more tokens are kept.
    """
    order = ordered_bits(logits)

    def halve(_, bounds):
        low, high = bounds  # the threshold is in [low, high]
        middle = low + ((high - low + 1) >> 1)
        is_enough = enough(order >= middle[:, None])
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle - 1)

    low, high = jnp.min(order, axis=-1), jnp.max(order, axis=-1)
    threshold, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 numbers that sort as the floats do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
