"""The mixture of experts: each token goes through the few experts that its router chooses.

    out = sum over the chosen experts e of weight_e * down_e(activation(gate_e x) * up_e x)

Tokens are sorted by expert and multiplied by groups (`grouped`). No token is dropped and no expert
has a capacity, so that what a token becomes does not depend on the tokens beside it. The router is
float32 whatever the computation is.

On a mesh every device works on its own tokens. Where the mesh has an axis `expert`, each device
along it has some of the experts, and tokens travel to their experts and back (`exchange`).

Letters: B batch, T tokens of a row, N = B T tokens of a device, k experts of a token, S = N k pairs
of a token and an expert, E experts, G groups of experts, D model width, f width of an expert, L
layers with a mixture, X devices along `expert`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from adpo_jax.devices import sharding
from adpo_jax.model import exchange, grouped, parameters
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.layers import gated, rms_norm
from adpo_jax.model.model_config import ClampedGate, Mixture, ModelConfig

DOWN_BIAS = "experts_down_bias"
ROUTED = "router/experts"
LOAD = "router/load"
PROBABILITY = "router/probability"
CHANGED = "router/changed"


class Routing(NamedTuple):
    """What a router says of each token.

    changed is [...] float32, how many of a token's experts are not those that the router would
    choose; None where none are forced.
    """

    experts: jax.Array  # [..., k] int32
    weights: jax.Array  # [..., k] float32, of those experts
    probabilities: jax.Array  # [..., E] float32, of all experts, summing to 1
    changed: jax.Array | None = None


def choose(
    mixture: Mixture, logits: jax.Array, bias: jax.Array | None, forced: jax.Array | None
) -> Routing:
    """The experts of each token and their weights.

    Args:
      logits: [..., E] float32.
      bias: [E] float32, added for the choice alone; None for none.
      forced: [..., k] int32, experts to take in place of the router's choice, with the weights that
        the router gives them; -1 at tokens whose choice is free. None for none.
    """
    m = mixture
    if m.router.startswith("sigmoid"):
        scores = jax.nn.sigmoid(logits)
        probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
    else:
        scores = probabilities = jax.nn.softmax(logits, axis=-1)
    # Sigmoids of large logits are equal in float32; the order of the logits is the same.
    by_logits = m.router in ("softmax_of_chosen", "sigmoid_of_inputs")
    ranked = logits if by_logits else scores
    ranked = jax.lax.stop_gradient(ranked if bias is None else ranked + bias)
    if m.groups > 1:
        ranked = _within_groups(m, ranked)
    experts = jax.lax.top_k(ranked, m.chosen)[1].astype(jnp.int32)
    changed = None
    if forced is not None:
        own, experts = experts, jnp.where(forced < 0, experts, forced)
        known = jnp.any(experts[..., None] == own[..., None, :], axis=-1)
        changed = jnp.sum(~known, axis=-1, dtype=jnp.float32)
    if m.router == "softmax_of_chosen":
        weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
    else:
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if m.normalised:
            least = 1e-20 if m.router.startswith("sigmoid") else 0.0
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + least)
    return Routing(experts, weights * m.scale, probabilities, changed)


def _within_groups(mixture: Mixture, ranked: jax.Array) -> jax.Array:
    """The scores [..., E], -inf outside the groups whose two best experts add up to the most."""
    scores_by_group = ranked.reshape(*ranked.shape[:-1], mixture.groups, -1)
    best = jnp.sum(jax.lax.top_k(scores_by_group, 2)[0], axis=-1)
    chosen = jax.lax.top_k(best, mixture.chosen_groups)[1]
    held = jnp.any(chosen[..., None] == jnp.arange(mixture.groups), axis=-2)
    return jnp.where(held[..., None], scores_by_group, -jnp.inf).reshape(ranked.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureFfn:
    """The `Ffn` of layers with a mixture.

    Its extras of a layer are `ROUTED` [B, T, k] int32, the experts of each token; `LOAD` [E]
    float32, the number of tokens that each expert got; and `PROBABILITY` [E] float32, the sum of
    the router's probabilities over tokens. Where experts are forced, `CHANGED` is the number of
    those, float32, that the router would not have chosen.

    Attributes:
      present: [B, T] bool, the places that hold a token. Others go through no expert and count for
        nothing. None for all.
      forced: [B, T, L, k] int, experts to take as in `choose`; None for none.
    """

    present: jax.Array | None = None
    forced: jax.Array | None = None

    @jax.named_scope("mixture")
    def __call__(self, weights, x: jax.Array, layer: LayerInfo):
        config = weights.config
        m, (B, T, _) = config.mixture, x.shape
        forced = None
        if self.forced is not None:
            at = _number_of(config, layer.index)
            forced = jax.lax.dynamic_index_in_dim(self.forced, at, axis=2, keepdims=False)
        present = jnp.ones((B, T), bool) if self.present is None else self.present
        routing = self._route(weights, x, forced)
        if m.beside_mlp:
            x = weights.norm(x, "experts_norm")
        out = _experts(weights, x, jnp.where(present[..., None], routing.experts, -1), routing)
        if m.shared_size:
            gate, up = weights.dense_each(x, "shared_gate", "shared_up")
            hidden = gated(config.activation, gate, up)
            hidden = sharding.constrain(hidden, weights.mesh, "batch", "length", "mlp")
            shared = weights.dense(hidden, "shared_down")
            if m.shared_gate:
                shared = shared * jax.nn.sigmoid(weights.dense(x, "shared_router"))
            out = out + shared
        chosen = (routing.experts[..., None] == jnp.arange(m.num_experts)) & present[
            ..., None, None
        ]
        extras = {} if forced is None else {CHANGED: jnp.sum(routing.changed * present)}
        return out, extras | {
            ROUTED: routing.experts,
            LOAD: jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32),
            PROBABILITY: jnp.sum(routing.probabilities * present[..., None], axis=(0, 1)),
        }

    def _route(self, weights, x, forced) -> Routing:
        c, router = weights.config, weights.params["experts_router"].astype(jnp.float32)
        x = x.astype(jnp.float32)
        if c.mixture.beside_mlp:
            x = rms_norm(x, weights.params["router_scale"], c.norm_eps, False) * x.shape[-1] ** -0.5
        logits = jnp.einsum("btd,de->bte", x, router, precision=jax.lax.Precision.HIGHEST)
        if weights.config.mixture.biases:
            logits = logits + weights.params["experts_router_bias"].astype(jnp.float32)
        given = {"logits": logits} | ({} if forced is None else {"forced": forced})
        bias = weights.params.get("experts_bias")

        def chosen(given, bias):
            return choose(weights.config.mixture, given["logits"], bias, given.get("forced"))

        by_token, whole = ("batch", "length"), ()
        sizes = {"batch": x.shape[0], "length": x.shape[1]}
        spread = sharding.on_each_device(chosen, weights.mesh, sizes, (by_token, whole), by_token)
        routing = spread(given, bias)
        if "experts_scale" not in weights.params:
            return routing
        is_theirs = routing.experts[..., None] == jnp.arange(c.mixture.num_experts)
        scale = weights.params["experts_scale"].astype(jnp.float32)
        return routing._replace(weights=routing.weights * jnp.sum(is_theirs * scale, axis=-1))


def _number_of(config: ModelConfig, layer):
    """The number of a layer among those with a mixture; a layer may be a traced number."""
    layers = config.mixture_layers
    if config.mlps_first:
        return layer - layers[0]
    return jnp.asarray(np.searchsorted(layers, np.arange(config.num_layers)))[layer]


def balance_loss(load: jax.Array, probability: jax.Array, tokens: jax.Array) -> jax.Array:
    """How unevenly tokens spread over experts: E times the sum of share x mean probability.

    It is k where all experts get the same share, and k is the number of experts of a token. Its
    gradient goes through the probabilities alone.

    Args:
      load, probability: [L, E] float32, as in the extras of `MixtureFfn`.
      tokens: the number of tokens that they count.

    Returns:
      The mean over the layers.

    Source: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6.
    """
    tokens = jnp.maximum(tokens, 1.0)
    layer_losses = jnp.sum(jax.lax.stop_gradient(load / tokens) * (probability / tokens), axis=-1)
    return load.shape[-1] * jnp.mean(layer_losses)


# --- the experts of a device's tokens


@dataclasses.dataclass(frozen=True)
class _Experts:
    """The experts as one device has them.

    Attributes:
      activation, scale: of the model, and of its adapters.
      weighs_inputs: whether the weight of an expert multiplies its input, not its output.
      gathers: for each parameter of the experts whose parts are gathered before a product, the axes
        of the mesh and the axis of the array (`grouped.product`).
      tensor: the mesh axis that splits the width of the experts; "" for none.
      expert: the mesh axis that splits the experts; "" for none.
      num_parts: X.
      everywhere: all axes of the mesh.
    """

    activation: str | ClampedGate
    scale: float
    weighs_inputs: bool = False
    gathers: tuple[tuple[str, tuple[str | tuple[str, ...], int]], ...] = ()
    tensor: str = ""
    expert: str = ""
    num_parts: int = 1
    everywhere: tuple[str, ...] = ()

    def apply_rows(self, params: Mapping[str, Any], likes, x_SD, weights_S1, sizes_E) -> jax.Array:
        """Rows through the experts, rows sorted by expert, times their weights."""
        gathers = {} if likes is not None else dict(self.gathers)

        def product(x, name):
            def by(x, name):
                like = None if likes is None else likes[name]
                return grouped.product(gathers.get(name), x, params[name], like, sizes_E)

            y = by(x, name)
            a, b = parameters.adapter_names(name)
            if a in params:
                y = y + by(self.scale * by(x, a), b)
            return with_bias(checkpoint_name(y, "projection"), f"{name}_bias")

        def with_bias(y, name):
            if name not in params:
                return y
            added = params[name], None if likes is None else likes[name]
            if self.tensor and name == DOWN_BIAS:
                # The results of the devices along this axis are summed.
                first = jax.lax.axis_index(self.tensor) == 0
                added = jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), added)
            return grouped.biased(y, *added, sizes_E)

        if self.weighs_inputs:
            x_SD = (x_SD * weights_S1).astype(x_SD.dtype)
        hidden = gated(self.activation, product(x_SD, "experts_gate"), product(x_SD, "experts_up"))
        y_SD = product(hidden, "experts_down")
        return y_SD if self.weighs_inputs else (y_SD * weights_S1).astype(x_SD.dtype)

    def __call__(self, params, x_BTD, experts_BTk, weights_BTk):
        """Tokens through their experts; an expert of -1 is none."""
        (B, T, D), k = x_BTD.shape, experts_BTk.shape[-1]
        num_experts = params["experts_gate"].shape[0] * self.num_parts
        ids_S = experts_BTk.reshape(-1)
        ids_S = jnp.where(ids_S < 0, num_experts, ids_S)
        to, back, sizes_E = grouped.sorted_by(ids_S, num_experts)
        rows = grouped.moved(k, x_BTD.reshape(-1, D), to, back)
        weights_S1 = grouped.moved(1, weights_BTk.reshape(-1, 1), to, back)
        if self.expert:
            y_SD = exchange.exchanged(self, rows, weights_S1, params, sizes_E)
        else:
            y_SD = self.apply_rows(params, None, rows, weights_S1, sizes_E)
        out = grouped.collected(k, y_SD, to, back).reshape(B, T, D)
        return jax.lax.psum(out, self.tensor) if self.tensor else out


def _experts(weights, x_BTD, experts_BTk, routing: Routing) -> jax.Array:
    """The weighted sum of what the experts of each token make of it."""
    names = [n for base in ("experts_gate", "experts_up", "experts_down")
             for n in (base, f"{base}_bias", *parameters.adapter_names(base))
             if n in weights.params]  # fmt: skip
    params = {name: weights.params[name] for name in names}
    args = (params, x_BTD, experts_BTk, routing.weights)
    weighs_inputs = weights.config.mixture.router == "sigmoid_of_inputs"
    plain = _Experts(weights.config.activation, weights.lora_scale, weighs_inputs)
    mesh = weights.mesh
    if mesh is None or mesh.size == 1:
        return plain(*args)
    specs = {
        name: sharding.partition_spec(mesh, parameters.at(("layers", name)).logical_axes, p.shape)
        for name, p in params.items()
    }
    sizes = zip(("batch", "length"), x_BTD.shape)
    tokens = PartitionSpec(*(sharding.axes_that_split(mesh, *size) for size in sizes))
    on_mesh = _on_mesh(plain, mesh, specs)
    return sharding.shard_map(on_mesh, mesh, (specs, tokens, tokens, tokens), tokens)(*args)


def _on_mesh(plain: _Experts, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> _Experts:
    """The experts of each device of a mesh."""

    def axis(logical: str) -> str:
        name = sharding.RULES[logical]
        return name if name in mesh.axis_names and mesh.shape[name] > 1 else ""

    width = sharding.rule(mesh, "embed")
    gathers = tuple(
        (name, (width, tuple(spec).index(width)))
        for name, spec in specs.items()
        if width in tuple(spec)
    )
    return dataclasses.replace(
        plain,
        gathers=gathers if sharding.mesh_axis_size(mesh, width) > 1 else (),
        tensor=axis("mlp"),
        expert=axis("expert"),
        num_parts=sharding.mesh_axis_size(mesh, axis("expert") or None),
        everywhere=sharding.splitting_axes(mesh),
    )
