"""Formulas and layouts for XLA's CPU compiler (jax 0.10); those of decoding serve GPUs too.

*Fusion.* The compiler hands a product of arrays that is then summed to a library that works through
it one number at a time. If the product is an array of its own first (`made`) and is then multiplied
by a vector, it is read at the speed of memory: the gradient of a norm takes a tenth of the time, an
update of a small model a sixth less. The compiler may also compute a value again for each of its
users, such as cosines for every head of every layer, but never a matrix product (`kept`). Other
compilers sum while they multiply and make no array in between, so there these are the plain
formulas.

*Decoding.* The compiler copies the slice of a stack of layers before a matrix product, which more
than doubles a decode step; so does that of GPUs. So up to as many layers as `engine.tuning` says
the engine takes the stack apart once for every set of weights (`decoding_params`), and the decoder
runs the layers one by one (`layer_by_layer`). On one device the weights of one input are joined
too: fewer and wider products take a tenth less time a step.

Letters: T tokens of all rows, D width, L layers.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.model import layer_stacks, parameter_table, parameters
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.lora import merged_layer
from adpo_jax.model.model_config import ModelConfig

# Layers run one by one up to this depth. Beyond it compile time would grow too far.
MAX_UNROLLED_LAYERS = 12

# --- fusion


def made(x: jax.Array) -> jax.Array:
    """x; on a CPU it becomes an array of its own, not fused with the operations after it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def kept(x: jax.Array) -> jax.Array:
    """x [..., D] float32; on a CPU it is computed once for all its users. D is small."""

    def as_product(x):
        identity = np.eye(x.shape[-1], dtype=x.dtype)
        return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(x, cpu=as_product, default=lambda x: x)


def sum_of_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum [D] float32 of all rows of x [..., D], each times its weight of [...]."""
    return jax.lax.platform_dependent(
        x, weights, cpu=_sum_of_rows_as_product, default=_plain_sum_of_rows
    )


def sum_of_columns(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The sums [...] float32 of the rows of x [..., D], each column times its weight of [D]."""
    return jax.lax.platform_dependent(
        x, weights, cpu=_sum_of_columns_as_product, default=_plain_sum_of_columns
    )


def _plain_sum_of_rows(x, weights):
    return jnp.sum(x * weights[..., None], axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)


def _plain_sum_of_columns(x, weights):
    return jnp.sum(x * weights, axis=-1, dtype=jnp.float32)


_float32_dot_general = functools.partial(
    jax.lax.dot_general,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
)


def _sum_of_rows_as_product(x, weights):
    rows = tuple(range(x.ndim - 1))  # they stay several axes, since a mesh may split several
    return _float32_dot_general(weights, x, dimension_numbers=((rows, rows), ((), ())))


def _sum_of_columns_as_product(x, weights):
    last = (x.ndim - 1,)
    return _float32_dot_general(x, weights, dimension_numbers=((last, (0,)), ((), ())))


# --- decoding


def decoding_params(
    params, config: ModelConfig, *, lora_scale: float | None, join: bool
) -> dict[str, Any]:
    """Parameters as CPUs and GPUs decode them: layers are a tuple of trees in place of a stack.

    Args:
      params: a tree whose layers are stacked.
      lora_scale: the scale to merge adapters with, into float32 weights; None leaves adapters as
        they are.
      join: whether weights of one input become one matrix, and tied embeddings also a head. False
        on a mesh, which splits each of them for itself.
    """
    layers = params["layers"]
    each = [layer_stacks.layer_of(layers, config, i) for i in range(config.num_layers)]
    if lora_scale is not None:
        each = [merged_layer(layer, lora_scale) for layer in each]
    if not join:
        return {**params, "layers": tuple(each)}
    # The product of a small batch with the untransposed table would turn it first: twice the time.
    head = params["head"] if "head" in params else params["embed"].T
    return {**params, "layers": tuple(map(_joined, each)), "head": head}


def _joined(layer: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer with one matrix [D, outputs] for the weights of one input.

    A layer that has adapters stays as it is.
    """
    layer = dict(layer)
    if any(map(parameters.is_adapter, layer)):
        return layer
    rows = [row for row in parameter_table.LAYER if row.joined]
    for group in dict.fromkeys(row.joined for row in rows):
        names = list(dict.fromkeys(row.name for row in rows if row.joined == group))
        if layer.keys() >= set(names):
            matrices = [layer.pop(name) for name in names]
            flat = [matrix.reshape(len(matrix), -1) for matrix in matrices]
            layer[group] = jnp.concatenate(flat, axis=1)
    return layer


def joined_products(
    config: ModelConfig,
    layer: Mapping[str, jax.Array],
    names: Sequence[str],
    product: Callable[[str], jax.Array],
) -> list[jax.Array]:
    """The products of one input with several weights of a layer, which may have been joined.

    Args:
      product: name of a parameter -> its product [B, T, *out] with the input [B, T, D].
    """
    rows = parameters.of_model(config)
    rows = [rows["layers", name] for name in names]
    if rows[0].joined not in layer:
        return [product(name) for name in names]
    shapes = [row.shape(config)[1:] for row in rows]
    y = product(rows[0].joined)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    parts = jnp.split(y, ends.tolist(), axis=-1)
    return [part.reshape(*y.shape[:-1], *shape) for part, shape in zip(parts, shapes)]


def layer_by_layer(run_layer, carry, layers: Sequence[Any], info: LayerInfo, rope_tables):
    """The scan of `model.decoder` unrolled; every layer gets numbers of `info` in place of arrays.

    Args:
      run_layer: (carry, layer's parameters, `LayerInfo`, rope tables) -> (carry, extras).
      info: that of all layers, arrays [L].

    Returns:
      (carry, extras), the latter stacked over the layers that have them.
    """
    rope_tables = tuple(map(kept, rope_tables))
    all_extras = []
    for i, params in enumerate(layers):
        carry, extras = run_layer(carry, params, info.of(i, int), rope_tables)
        all_extras += [extras] if extras else []
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *all_extras or [{}])
