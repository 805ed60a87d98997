"""Stacked layers: the parameters of some of them, and the scans over periods of unlike ones.

A parameter is stacked over the layers that have it, which need not be all. Layers without a window
may have other heads than those with one (`ModelConfig.global_layers`, Gemma 4), layers may have
linear attention (`ModelConfig.linear_attention`, Qwen3-Next), and a layer with an MLP may follow
each with a mixture of experts (`ModelConfig.mlp_layers`, Llama 4), so that no scan runs them all: a
step of a scan runs one period of their pattern.

Letters: B batch, T tokens, L layers, P width of a layer's own embeddings.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.model import parameters
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.model_config import ModelConfig


class Stretch(NamedTuple):
    """Layers that a scan runs: the same period of layers again and again."""

    layers: range
    period: int


def stretches(config: ModelConfig) -> list[Stretch]:
    """The layers, cut where their parameters change.

    Layers with keys of their own come before those that share keys, and those with an MLP may come
    before those with a mixture. Where layers of other parameters take turns, with and without a
    window, of full and of linear attention, or with a mixture and without, the period of a stretch
    is that of their pattern, and layers that do not complete a period are a stretch of their own.
    """
    last, mlps = config.num_layers, config.mlp_layers if config.mlps_first else ()
    cuts = sorted({0, len(mlps), last - config.shared_kv_layers, last})
    parts = [range(*bounds) for bounds in itertools.pairwise(cuts)]
    if not config.in_periods:
        return [Stretch(part, 1) for part in parts]
    found, mixtures = [], config.mixture_layers
    for part in parts:
        kinds = [(config.kind_of(i), i in mixtures) for i in part]
        period = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p])
        whole = len(part) // period * period
        found.append(Stretch(part[:whole], period))
        if rest := part[whole:]:
            found.append(Stretch(rest, len(rest)))
    return found


def layers_of(layers: Mapping[str, Any], config: ModelConfig, part: range) -> dict[str, Any]:
    """The stacked parameters of some layers, from those of a model's stack.

    Args:
      layers: parameters, each stacked over the layers that have it.
      part: neighbours. A parameter that none of them has is left out.
    """
    found = {}
    for name, x in layers.items():
        having = parameters.at(("layers", name)).layers_of(config)
        places = [place for place, layer in enumerate(having) if layer in part]
        if places:
            found[name] = x if len(x) == len(places) else x[places[0] : places[0] + len(places)]
    return found


def layer_of(layers: Mapping[str, Any], config: ModelConfig, layer: int) -> dict[str, Any]:
    """The parameters of one layer, from those of a model's stack."""
    places = {name: _place(config, name, layer) for name in layers}
    return {name: x[places[name]] for name, x in layers.items() if places[name] is not None}


def _place(config: ModelConfig, name: str, layer: int) -> int | None:
    """The place of a layer in the stack of a parameter; None where the layer does not have it."""
    having = parameters.at(("layers", name)).layers_of(config)
    return having.index(layer) if layer in having else None


def in_periods(
    layers: Mapping[str, Any], config: ModelConfig, stretch: Stretch
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """The parameters of a stretch by its periods.

    Returns:
      The parameters, each [periods, layers of a period that have it, ...], and of each layer of a
      period the places of its parameters there, by their names.
    """
    stacked, repeats = {}, len(stretch.layers) // stretch.period
    for name, x in layers_of(layers, config, stretch.layers).items():
        stacked[name] = x.reshape(repeats, len(x) // repeats, *x.shape[1:])
    period = stretch.layers[: stretch.period]
    places = [{} for _ in period]
    for name in stacked:
        having = parameters.at(("layers", name)).layers_of(config)
        for place in [i - period.start for i in having if i in period]:
            places[place][name] = sum(name in before for before in places[:place])
    return stacked, places


def plainly_named(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of one layer by their plain names."""
    return {parameters.plain_name(name): x for name, x in layer.items()}


def scan_periods(
    config: ModelConfig,
    run_layer,
    carry,
    layers,
    info: LayerInfo,
    layer_inputs,
    recomputed,
    *,
    unroll: bool = False,
):
    """The scans of the decoder over layers of two kinds; a step of a scan is one period of them.

    Args:
      run_layer: (carry, layer's parameters, `LayerInfo`) -> (carry, extras).
      info: that of all layers, arrays [L].
      layer_inputs: [L, B, T, P], their own embeddings; None for none.
      recomputed: makes of `run_layer` what the backward pass runs again.
      unroll: whether all periods are written out in place of a loop.

    Returns:
      (carry, extras stacked over all layers that have them).
    """

    def scan(carry, stretch: Stretch):
        stacked, places = in_periods(layers, config, stretch)
        first, last = stretch.layers.start, stretch.layers.stop
        each = jax.tree.map(lambda x: jnp.asarray(x[first:last]), (info, layer_inputs))
        each = jax.tree.map(lambda x: x.reshape(-1, stretch.period, *x.shape[1:]), each)

        def one_layer(carry, i: int, at, stacked, info: LayerInfo, layer_inputs):
            layer_params = {name: stacked[name][place] for name, place in at.items()}
            if layer_inputs is not None:
                layer_params["per_layer_input"] = layer_inputs[i]
            layer = info.of(i)._replace(store=config.stores[first + i])
            return recomputed(run_layer)(carry, layer_params, layer)

        def one_period(carry, period):
            stacked, (info, layer_inputs) = period
            extras = []
            for i, at in enumerate(places):
                carry, more = one_layer(carry, i, at, stacked, info, layer_inputs)
                extras += [more] if more else []
            return carry, jax.tree.map(lambda *x: jnp.stack(x), *extras or [{}])

        carry, extras = jax.lax.scan(one_period, carry, (stacked, each), unroll=unroll)
        return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), extras)

    all_extras = []
    for stretch in stretches(config):
        carry, extras = scan(carry, stretch)
        all_extras += [extras] if extras else []
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *all_extras or [{}])
