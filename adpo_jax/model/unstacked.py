"""Layers in a tuple, run one by one: how CPUs and GPUs decode.

Their compilers copy the slice of a stack of layers before a matrix product, which on a CPU more
than doubles a decode step. So up to as many layers as `engine.tuning` says the engine takes the
stack apart once for every set of weights (`decoding_params`), and the decoder runs the layers one
by one (`layer_by_layer`). On one device the weights of one input are joined too: fewer and wider
products take a tenth less time a step.

Letters: D width, L layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.model import cpu, layer_stacks, parameter_table, parameters
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.lora import merged_layer
from adpo_jax.model.model_config import ModelConfig


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
    rope_tables = tuple(map(cpu.kept, rope_tables))
    all_extras = []
    for i, params in enumerate(layers):
        carry, extras = run_layer(carry, params, info.of(i, int), rope_tables)
        all_extras += [extras] if extras else []
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *all_extras or [{}])
