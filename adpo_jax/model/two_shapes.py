"""Layers of two kinds in turn.

Layers without a window may have other heads than those with one (`ModelConfig.global_layers`, Gemma
4), layers may have linear attention (`ModelConfig.linear_attention`, Qwen3-Next), and a layer with
an MLP may follow each with a mixture of experts (`ModelConfig.mlp_layers`, Llama 4), so that no
scan runs them all: a step of a scan runs one period of their pattern.

Letters: B batch, T tokens, L layers, P width of a layer's own embeddings.
"""

import jax
import jax.numpy as jnp

from adpo_jax.model import parameters
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.model_config import ModelConfig


def scan_periods(
    config: ModelConfig,
    run_layer,
    carry,
    layers,
    info: LayerInfo,
    of_layers,
    recomputed,
    *,
    unroll: bool = False,
):
    """The scans of the decoder over layers of two kinds; a step of a scan is one period of them.

    Args:
      run_layer: (carry, layer's parameters, `LayerInfo`) -> (carry, extras).
      info: that of all layers, arrays [L].
      of_layers: [L, B, T, P], their own embeddings; None for none.
      recomputed: makes of `run_layer` what the backward pass runs again.
      unroll: whether all periods are written out in place of a loop.

    Returns:
      (carry, extras stacked over all layers that have them).
    """

    def scan(carry, run: parameters.Run):
        stacked, places = parameters.in_periods(layers, config, run)
        first, last = run.layers.start, run.layers.stop
        each = jax.tree.map(lambda x: jnp.asarray(x[first:last]), (info, of_layers))
        each = jax.tree.map(lambda x: x.reshape(-1, run.period, *x.shape[1:]), each)

        def one_layer(carry, i: int, at, stacked, info: LayerInfo, of_layers):
            of_layer = {name: stacked[name][place] for name, place in at.items()}
            if of_layers is not None:
                of_layer["per_layer_input"] = of_layers[i]
            layer = info.of(i)._replace(store=config.stores[first + i])
            return recomputed(run_layer)(carry, of_layer, layer)

        def one_period(carry, of_period):
            stacked, of_layers = of_period
            extras = []
            for i, at in enumerate(places):
                carry, more = one_layer(carry, i, at, stacked, *of_layers)
                extras += [more] if more else []
            return carry, jax.tree.map(lambda *x: jnp.stack(x), *extras or [{}])

        carry, extras = jax.lax.scan(one_period, carry, (stacked, each), unroll=unroll)
        return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), extras)

    all_extras = []
    for run in parameters.runs_of_layers(config):
        carry, extras = scan(carry, run)
        all_extras += [extras] if extras else []
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *all_extras or [{}])
