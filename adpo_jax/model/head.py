"""From hidden states to log-probs of given tokens, without ever holding [B, T, V] logits.

The head runs over chunks of tokens, and the logits of a chunk live no longer than the work on it.
There are two ways to differentiate it:

    token_log_probs      log-probs with any gradient; the backward pass makes the logits again
    weighted_log_probs   sum of weights * log-probs for weights known beforehand: the gradient
                         (weights * (one-hot - softmax)) is made where the logits are at hand, which
                         saves one product in four

Softmax, log-probs and accumulated gradients are float32 whatever the hidden states are. Where the
mesh splits the vocabulary, each device keeps its part of the logits, and only maxima, sums and the
targets' logits travel. Where the mesh splits the width, the weight is gathered once before the
chunks, and the parts of its gradient are added up once after them, each on the device that keeps
it; of many micro-batches, before the first and after the last one where memory allows (`Once`).

Letters: B batch, T tokens, C tokens of a chunk, D model width, V vocabulary, S devices that share
out the tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from adpo_jax.devices import sharding
from adpo_jax.devices.chips import chip_of
from adpo_jax.devices.sharding import axes_that_split
from adpo_jax.model import head_gpu
from adpo_jax.model.attention_choice import old_gpu
from adpo_jax.model.model_config import ModelConfig

# Tokens of a device whose logits are alive at once; at V = 151,936 a thousand take 0.6 GB.
# A GPU works on larger products faster, and goes through the weight's gradient less often.
TOKENS_PER_CHUNK, TOKENS_PER_CHUNK_GPU = 1024, 4096
# A chunk is a multiple of this, where there are as many tokens.
CHUNK_MULTIPLE = 128
# The most of a device's memory that a whole weight and its gradient may take, `Once`.
WHOLE_SHARE = 1 / 16


class Whole(NamedTuple):
    """A weight that every device has whole, and where each keeps its own gradient of it.

    Attributes:
      weight: [V, D] where it is the embedding, else [D, V], in the dtype of the hidden states. It
        gets no gradient.
      gradient: [S, D, V] float32, running sum over micro-batches of each device's gradient. The
        cotangent returned is the sum including the current micro-batch, not yet reduced over
        devices.
    """

    weight: jax.Array
    gradient: jax.Array


@dataclasses.dataclass(frozen=True)
class Head:
    """The settings of a head; its methods see one device's part of every array.

    Attributes:
      tied: whether the weight is the embedding [V, D], not [D, V].
      divisor: divides the logits before the soft cap.
      rows_axes, places_axes: mesh axes that split the rows and the tokens of a row.
      vocab_axis: the mesh axis that splits the vocabulary, empty for none.
      width_axes: mesh axes that split the width of the weight.
      with_kernel: whether a kernel for GPUs goes over the logits.
      is_whole: whether the weight is a `Whole`.
    """

    tied: bool
    divisor: float
    soft_cap: float | None
    temperature: float
    chunk: int
    with_entropy: bool
    mesh: Mesh | None
    rows_axes: tuple[str, ...]
    places_axes: tuple[str, ...]
    vocab_axis: str
    width_axes: tuple[str, ...]
    with_kernel: bool
    is_whole: bool = False

    @property
    def for_whole(self) -> "Head":
        """This head for a `Whole` weight."""
        return dataclasses.replace(self, width_axes=(), is_whole=True)

    @property
    def tokens_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the tokens."""
        return (*self.rows_axes, *self.places_axes)

    @property
    def gradient_spec(self) -> Spec:
        """How the gradient of the weight lies."""
        if not self.is_whole:
            return self.weight_spec
        return Spec(self.tokens_axes or None, None, self.vocab_axis or None)

    @property
    def weight_spec(self) -> Spec:
        vocab, width = self.vocab_axis or None, self.width_axes or None
        return Spec(vocab, width) if self.tied else Spec(width, vocab)

    @property
    def rows_spec(self) -> Spec:
        """How arrays [B, T, ...] lie."""
        return Spec(self.rows_axes or None, self.places_axes or None)

    def whole(self, weight):
        """The weight of which each device has a part of the width."""
        if not self.width_axes:
            return weight
        return jax.lax.all_gather(weight, self.width_axes, axis=1 if self.tied else 0, tiled=True)

    def spread(self, function, weight, *rows, out_rows: int, with_weight: bool, others=()):
        """Runs `function(weight, *rows)` on every device, over its part of rows and vocabulary.

        Args:
          out_rows: how many results have the rows' leading axes.
          with_weight: whether there is one more result, the weight's gradient (`settle`).
          others: (head, weight) of each further head, which splits rows and vocabulary alike;
            their weights follow the first one among the arguments of `function`.
        """
        heads, weights = zip((self, weight), *others)
        if self.mesh is None or self.mesh.size == 1:
            return function(*weights, *rows)

        def local(*arguments):
            whole = map(Head.whole, heads, arguments)
            return function(*whole, *arguments[len(heads) :])

        specs = [
            Whole(head.weight_spec, head.gradient_spec)
            if isinstance(w, Whole)
            else head.weight_spec
            for head, w in zip(heads, weights)
        ]
        return sharding.shard_map(
            local,
            self.mesh,
            (*specs, *(self.rows_spec for _ in rows)),
            (*(self.rows_spec,) * out_rows, *((self.gradient_spec,) if with_weight else ())),
        )(*weights, *rows)

    def over_vocab(self, reduce, x):
        """Finishes a reduction over the vocabulary; `reduce` is jax.lax.psum or pmax."""
        return reduce(x, self.vocab_axis) if self.vocab_axis else x

    def logits(self, weight, hidden_CD):
        """Soft-capped logits over the temperature, [C, V] float32, and their derivative."""
        spec = "cd,vd->cv" if self.tied else "cd,dv->cv"
        logits = jnp.einsum(spec, hidden_CD, weight, preferred_element_type=jnp.float32)
        divisor = self.temperature * self.divisor
        slope = 1.0 / divisor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.soft_cap is not None:
            capped = jnp.tanh(logits / self.soft_cap)
            logits, slope = self.soft_cap * capped, (1.0 - jnp.square(capped)) / divisor
        return (logits if self.temperature == 1.0 else logits / self.temperature), slope

    def targets(self, logits_CV, targets_C):
        """The column of each target, [C, V] bool; True on the device that has it."""
        V = logits_CV.shape[-1]
        first = jax.lax.axis_index(self.vocab_axis) * V if self.vocab_axis else 0
        return (targets_C - first)[:, None] == jax.lax.broadcasted_iota(jnp.int32, (1, V), 1)

    def scores(self, logits_CV, targets_C):
        """(log-prob [C], entropy [C], log of the partition function [C])."""
        if self.with_kernel:
            log_z_C, mean_C = head_gpu.log_z_and_mean(logits_CV)
            target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
            entropy_C = log_z_C - mean_C if self.with_entropy else jnp.zeros_like(log_z_C)
            return target_C - log_z_C, entropy_C, log_z_C
        top_C = self.over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1))
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        sum_C = self.over_vocab(jax.lax.psum, jnp.sum(exp_CV, axis=-1))
        log_z_C = top_C + jnp.log(sum_C)
        if self.vocab_axis:
            at_target_CV = jnp.where(self.targets(logits_CV, targets_C), logits_CV, 0.0)
            target_C = jax.lax.psum(jnp.sum(at_target_CV, axis=-1), self.vocab_axis)
        else:
            target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        if not self.with_entropy:
            return target_C - log_z_C, jnp.zeros_like(log_z_C), log_z_C
        mean_C = self.over_vocab(jax.lax.psum, jnp.sum(exp_CV * logits_CV, axis=-1)) / sum_C
        return target_C - log_z_C, log_z_C - mean_C, log_z_C

    def logit_gradient(self, targets_C, logits_CV, slope, log_z_C, g_C, e_C, h_C):
        """The gradient of g . log_prob + e . entropy by the logits before cap and temperature.

        d log_prob / d logits = one-hot - p,   d entropy / d logits = -p (log p + H)

        e_C and h_C (the entropy) are None where no gradient comes from the entropy.
        """
        log_p_CV = logits_CV - log_z_C[:, None]
        pull_CV = g_C[:, None]
        if e_C is not None:
            pull_CV = pull_CV + e_C[:, None] * (log_p_CV + h_C[:, None])
        onehot_CV = jnp.where(self.targets(logits_CV, targets_C), g_C[:, None], 0.0)
        return slope * (onehot_CV - pull_CV * jnp.exp(log_p_CV))

    def by_inputs(self, weight, hidden_CD, d_CV):
        """Gradients by hidden states and weight, from that of `logit_gradient`."""
        d_CV = d_CV.astype(hidden_CD.dtype)
        spec = "cv,vd->cd" if self.tied else "cv,dv->cd"
        d_hidden = jnp.einsum(spec, d_CV, weight, preferred_element_type=jnp.float32)
        # It is always [D, V], so that a CPU transposes the narrow operand.
        return d_hidden, jnp.einsum(
            "cd,cv->dv", hidden_CD, d_CV, preferred_element_type=jnp.float32
        )

    def chunked(self, function, first, *rows):
        """Scans `function(carry, *chunk) -> (carry, results)` over chunks of the rows' tokens.

        Args:
          rows: [B, T, ...] each; a chunk is [C, ...].

        Returns:
          (the last carry, results [B, T, ...]).
        """
        B, T = rows[0].shape[:2]
        num_chunks = -(-B * T // self.chunk)
        even = -(-B * T // num_chunks)  # so that the last chunk is no smaller than the others
        C = min(self.chunk, B * T, -(-even // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)

        def split(x):
            x = x.reshape(B * T, *x.shape[2:])
            x = jnp.pad(x, ((0, num_chunks * C - B * T),) + ((0, 0),) * (x.ndim - 1))
            return x.reshape(num_chunks, C, *x.shape[1:])

        carry, out = jax.lax.scan(lambda c, x: function(c, *x), first, tuple(map(split, rows)))

        def join(x):
            return x.reshape(num_chunks * C, *x.shape[2:])[: B * T].reshape(B, T, *x.shape[2:])

        return carry, jax.tree.map(join, out)

    def settle(self, d_hidden_BTD, d_weight_DV, dtype):
        """Sums the gradients over the devices that share an array, in the arrays' layouts."""
        d_hidden_BTD = self.over_vocab(jax.lax.psum, d_hidden_BTD).astype(dtype)
        if not self.is_whole:
            return d_hidden_BTD, self.settled(d_weight_DV)
        return d_hidden_BTD, d_weight_DV[None]

    def settled(self, d_weight_DV):
        """The gradient of the weight, summed over the devices, each with its part."""
        if copies := [axis for axis in self.tokens_axes if axis not in self.width_axes]:
            d_weight_DV = jax.lax.psum(d_weight_DV, copies)
        if self.width_axes:
            d_weight_DV = jax.lax.psum_scatter(d_weight_DV, self.width_axes, tiled=True)
        return d_weight_DV.T if self.tied else d_weight_DV

    def cast(self, weight, dtype):
        """The weight in the dtype of the computation."""
        return weight if self.is_whole else weight.astype(dtype)

    def begin(self, weight):
        """The weight, and what its gradient [D, V] is added to."""
        if self.is_whole:
            return weight.weight, weight.gradient[0]
        shape = weight.T.shape if self.tied else weight.shape
        return weight, jnp.zeros(shape, jnp.float32)

    def cotangent(self, weight, d_weight):
        """The gradient as JAX wants it, in the form and dtype of the weight."""
        if self.is_whole:
            return Whole(jnp.zeros_like(weight.weight), d_weight)
        return d_weight.astype(weight.dtype)


def head_of(
    config, params, mesh, hidden_BTD, chunk: int | None, whole: Whole | None = None, **settings
) -> tuple[Head, jax.Array | Whole]:
    """The head for hidden states of this shape, and its weight."""
    device = sharding.first_device(mesh)
    on_gpu = device.platform == "gpu"
    if chunk is None:
        chunk = TOKENS_PER_CHUNK_GPU if on_gpu else TOKENS_PER_CHUNK
    names, (B, T) = sharding.names_of, hidden_BTD.shape[:2]
    rows_axes = names(axes_that_split(mesh, "batch", B))
    places_axes = names(axes_that_split(mesh, "length", T))
    width_axes = names(axes_that_split(mesh, "embed", config.hidden_size))
    vocab_axis = axes_that_split(mesh, "vocab", config.vocab_size) or ""
    head = Head(
        tied=config.tie_embeddings,
        divisor=config.logit_divisor,
        soft_cap=config.logit_soft_cap,
        chunk=chunk,
        mesh=mesh,
        rows_axes=rows_axes,
        places_axes=places_axes,
        # Devices with the same tokens each make the whole gradient, so that no parts are added up.
        width_axes=width_axes if {*width_axes} <= {*rows_axes, *places_axes} else (),
        vocab_axis=vocab_axis,
        with_kernel=on_gpu and not vocab_axis and not old_gpu(device) and head_gpu.runs(),
        **settings,
    )
    if whole is not None:
        return head.for_whole, whole
    return head, params[weight_name(config)]


def weight_name(config: ModelConfig) -> str:
    """The name of the head's weight among the parameters."""
    return "embed" if config.tie_embeddings else "head"


@dataclasses.dataclass(frozen=True)
class Once:
    """A head whose weight is gathered, and its gradient summed, once for many micro-batches.

    The first micro-batch takes `gather`'s result as `whole`, the others the same weight with the
    gradient of the one before, and `settle` takes that of the last one.
    """

    _head: Head
    _dtype: jnp.dtype

    @classmethod
    def of(
        cls, config: ModelConfig, weight: jax.Array, mesh: Mesh | None, hidden: jax.ShapeDtypeStruct
    ) -> "Once | None":
        """That of micro-batches with such hidden states [B, T, D].

        None where it does not pay: the mesh does not split the width, or the device is known to
        lack the memory.
        """
        settings = {"temperature": 1.0, "chunk": None, "with_entropy": False}
        head, _ = head_of(config, {weight_name(config): weight}, mesh, hidden, **settings)
        if not head.width_axes:
            return None
        shares = mesh.shape[head.vocab_axis] if head.vocab_axis else 1
        chip = chip_of(sharding.first_device(mesh))
        size = math.prod(weight.shape) // shares * (4 + jnp.dtype(hidden.dtype).itemsize)
        if chip is not None and size > WHOLE_SHARE * chip.usable:
            return None
        return cls(head, hidden.dtype)

    def gather(self, weight: jax.Array) -> Whole:
        """The weight as it is, whole on every device."""
        head, whole = self._head, self._head.for_whole

        def local(weight):
            weight = head.whole(weight.astype(self._dtype))
            shape = weight.T.shape if head.tied else weight.shape
            return Whole(weight, jnp.zeros((1, *shape), jnp.float32))

        specs = Whole(whole.weight_spec, whole.gradient_spec)
        return sharding.shard_map(local, head.mesh, (head.weight_spec,), specs)(weight)

    def settle(self, gradient: jax.Array) -> jax.Array:
        """The gradient of the weight, float32, laid out as it, from that of `Whole.gradient`."""
        head = self._head

        def local(gradient):
            return head.settled(gradient[0])

        specs = (head.for_whole.gradient_spec,)
        return sharding.shard_map(local, head.mesh, specs, head.weight_spec)(gradient)


def token_log_probs(
    config: ModelConfig,
    params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    mesh: Mesh | None = None,
    tokens_per_chunk: int | None = None,
    whole: Whole | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each target under the tempered softmax at its position, and the entropy there.

    Both are differentiable by `params` and `hidden_BTD`.

    Args:
      hidden_BTD: hidden states at the positions that predict the targets.
      targets_BT: int32.
      temperature: divides the logits.
      with_entropy: False spares a pass over the logits; the entropy is then 0.
      tokens_per_chunk: tokens of a device whose logits are alive at once; None for what suits the
        devices.
      whole: the weight, which then gets its gradient there and not in `params`; None for that of
        `params`.

    Returns:
      (log_probs, entropy), each [B, T] float32, in nats.
    """
    head, weight = head_of(
        config,
        params,
        mesh,
        hidden_BTD,
        temperature=temperature,
        chunk=tokens_per_chunk,
        with_entropy=with_entropy,
        whole=whole,
    )
    return _log_probs(head, weight, hidden_BTD, targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(head: Head, weight, hidden_BTD, targets_BT):
    return _log_probs_forward(head, weight, hidden_BTD, targets_BT)[0]


def _log_probs_forward(head: Head, weight, hidden_BTD, targets_BT):
    def forward(weight, hidden_BTD, targets_BT):
        def chunk_scores(_, hidden_CD, targets_C):
            return None, head.scores(head.logits(weight, hidden_CD)[0], targets_C)

        return head.chunked(chunk_scores, None, hidden_BTD, targets_BT)[1]

    log_probs, entropy, log_z = head.spread(
        forward,
        weight.weight if head.is_whole else head.cast(weight, hidden_BTD.dtype),
        hidden_BTD,
        targets_BT,
        out_rows=3,
        with_weight=False,
    )
    return (log_probs, entropy), (weight, hidden_BTD, targets_BT, log_z, entropy)


def _log_probs_backward(head: Head, residuals, cotangents):
    weight, hidden_BTD, targets_BT, log_z_BT, entropy_BT = residuals

    def backward(weight, *rows):
        weight, begun = head.begin(weight)

        def chunk_gradient(d_weight, hidden_CD, targets_C, log_z_C, g_C, *entropy):
            logits_CV, slope = head.logits(weight, hidden_CD)
            e_C, h_C = entropy or (None, None)
            d_CV = head.logit_gradient(targets_C, logits_CV, slope, log_z_C, g_C, e_C, h_C)
            d_hidden_CD, d_chunk = head.by_inputs(weight, hidden_CD, d_CV)
            return d_weight + d_chunk, d_hidden_CD

        d_weight, d_hidden_BTD = head.chunked(chunk_gradient, begun, *rows)
        return head.settle(d_hidden_BTD, d_weight, hidden_BTD.dtype)

    rows = (hidden_BTD, targets_BT, log_z_BT, cotangents[0])
    rows += (cotangents[1], entropy_BT) if head.with_entropy else ()
    cast = head.cast(weight, hidden_BTD.dtype)
    d_hidden, d_weight = head.spread(backward, cast, *rows, out_rows=1, with_weight=True)
    return head.cotangent(weight, d_weight), d_hidden, _no_gradient(targets_BT)


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def weighted_log_probs(
    config: ModelConfig,
    params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    entropy_weights_BT: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    mesh: Mesh | None = None,
    tokens_per_chunk: int | None = None,
    whole: Whole | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """sum(weights * log-probs), differentiable by `params` and `hidden_BTD`, in one pass.

    Args:
      weights_BT: float32, without gradient; the other arguments are those of `token_log_probs`.
        With `whole` the sum must be differentiated with a cotangent of 1.
      entropy_weights_BT: the same for the entropies, whose weighted sum is added; None for none.

    Returns:
      The sum, and (log_probs, entropy) as of `token_log_probs` but without gradient.
    """
    head, weight = head_of(
        config,
        params,
        mesh,
        hidden_BTD,
        temperature=temperature,
        chunk=tokens_per_chunk,
        with_entropy=with_entropy,
        whole=whole,
    )
    weights = jax.lax.stop_gradient((weights_BT, entropy_weights_BT))
    return _weighted(head, weight, hidden_BTD, targets_BT, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(head: Head, weight, hidden_BTD, targets_BT, weights):
    scored = _log_probs(head, weight, hidden_BTD, targets_BT)
    return _weighted_sum(weights, scored), scored


def _weighted_sum(weights, scored):
    return sum(jnp.sum(w * x) for w, x in zip(weights, scored) if w is not None)


def _weighted_forward(head: Head, weight, hidden_BTD, targets_BT, weights):
    def forward(weight, *rows):
        weight, begun = head.begin(weight)

        def chunk_results(d_weight, hidden_CD, targets_C, g_C, e_C=None):
            logits_CV, slope = head.logits(weight, hidden_CD)
            log_prob_C, entropy_C, log_z_C = head.scores(logits_CV, targets_C)
            h_C = None if e_C is None else entropy_C
            d_CV = head.logit_gradient(targets_C, logits_CV, slope, log_z_C, g_C, e_C, h_C)
            d_hidden_CD, d_chunk = head.by_inputs(weight, hidden_CD, d_CV)
            return d_weight + d_chunk, (log_prob_C, entropy_C, d_hidden_CD)

        d_weight, (log_probs, entropy, d_hidden) = head.chunked(chunk_results, begun, *rows)
        return log_probs, entropy, *head.settle(d_hidden, d_weight, hidden_BTD.dtype)

    rows = (hidden_BTD, targets_BT, *(w for w in weights if w is not None))
    cast = head.cast(weight, hidden_BTD.dtype)
    log_probs, entropy, d_hidden, d_weight = head.spread(
        forward, cast, *rows, out_rows=3, with_weight=True
    )
    scored = (log_probs, entropy)
    residuals = (head.cotangent(weight, d_weight), d_hidden, targets_BT, weights)
    return (_weighted_sum(weights, scored), scored), residuals


def _weighted_backward(head: Head, residuals, cotangents):
    d_weight, d_hidden_BTD, targets_BT, weights = residuals
    scale = cotangents[0]
    return (
        jax.tree.map(lambda x: (scale * x).astype(x.dtype), d_weight),
        (scale * d_hidden_BTD).astype(d_hidden_BTD.dtype),
        _no_gradient(targets_BT),
        jax.tree.map(jnp.zeros_like, weights),
    )


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _no_gradient(integers: jax.Array) -> np.ndarray:
    return np.zeros(integers.shape, jax.dtypes.float0)
