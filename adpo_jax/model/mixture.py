"""The mixture of experts: each token goes through the few experts that its router chooses.

    out = sum over the chosen experts e of weight_e * down_e(activation(gate_e x) * up_e x)

Tokens are sorted by expert and multiplied by groups (`grouped`). No token is dropped and no expert
has a capacity, so that what a token becomes does not depend on the tokens beside it. The router is
float32 whatever the computation is.

On a mesh every device works on its own tokens. Where the mesh has an axis `expert`, each device
along it has some of the experts, and tokens travel to their experts and back (`_Exchange`).

Letters: B batch, T tokens of a row, N = B T tokens of a device, k experts of a token, S = N k pairs
of a token and an expert, E experts, G groups of experts, D model width, f width of an expert, L
layers with a mixture, X devices along `expert`, C places that a round has for each of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from adpo_jax.devices import sharding
from adpo_jax.model import grouped, parameters
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.layers import gated, rms_norm
from adpo_jax.model.model_config import ClampedGate, Mixture, ModelConfig

# The places that a round of an exchange has, over those that an even choice of experts needs.
ROOM = 1.25
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
    ranked = logits if m.router == "softmax_of_chosen" else scores
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
    of_groups = ranked.reshape(*ranked.shape[:-1], mixture.groups, -1)
    best = jnp.sum(jax.lax.top_k(of_groups, 2)[0], axis=-1)
    chosen = jax.lax.top_k(best, mixture.chosen_groups)[1]
    held = jnp.any(chosen[..., None] == jnp.arange(mixture.groups), axis=-2)
    return jnp.where(held[..., None], of_groups, -jnp.inf).reshape(ranked.shape)


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

        def of_rows(given, bias):
            return choose(weights.config.mixture, given["logits"], bias, given.get("forced"))

        by_row, whole = ("batch",), ()
        sizes = {"batch": x.shape[0]}
        spread = sharding.on_each_device(of_rows, weights.mesh, sizes, (by_row, whole), by_row)
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
    of_layers = jnp.sum(jax.lax.stop_gradient(load / tokens) * (probability / tokens), axis=-1)
    return load.shape[-1] * jnp.mean(of_layers)


# --- the experts of a device's tokens


@dataclasses.dataclass(frozen=True)
class _Experts:
    """The experts as one device has them.

    Attributes:
      activation, scale: of the model, and of its adapters.
      weighs_inputs: whether the weight of an expert multiplies its input, not its output.
      gathers: for each parameter of the experts whose parts are gathered before a product, the axis
        of the mesh and of the array (`grouped.product`).
      tensor: the mesh axis that splits the width of the experts; "" for none.
      expert: the mesh axis that splits the experts; "" for none.
      num_parts: X.
      everywhere: all axes of the mesh.
    """

    activation: str | ClampedGate
    scale: float
    weighs_inputs: bool = False
    gathers: tuple[tuple[str, tuple[str, int]], ...] = ()
    tensor: str = ""
    expert: str = ""
    num_parts: int = 1
    everywhere: tuple[str, ...] = ()

    def of_rows(self, params: Mapping[str, Any], likes, x_SD, weights_S1, sizes_E) -> jax.Array:
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
        to, back, sizes_E = sorted_by(ids_S, num_experts)
        rows = grouped.moved(k, x_BTD.reshape(-1, D), to, back)
        weights_S1 = grouped.moved(1, weights_BTk.reshape(-1, 1), to, back)
        if self.expert:
            y_SD = _exchanged(self, rows, weights_S1, params, sizes_E)
        else:
            y_SD = self.of_rows(params, None, rows, weights_S1, sizes_E)
        out = grouped.collected(k, y_SD, to, back).reshape(B, T, D)
        return jax.lax.psum(out, self.tensor) if self.tensor else out


def sorted_by(ids_S: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An order of rows by group, in which the rows of a group keep their order.

    Args:
      ids_S: [S] int32, the group of each row; `num_groups` for none.

    Returns:
      (the row of each place, the place of each row, the rows of each group), -1 for none.
    """
    order = jnp.argsort(ids_S, stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)
    to = jnp.where(ids_S[order] < num_groups, order, -1)
    back = jnp.where(ids_S < num_groups, place, -1)
    sizes = jnp.sum(ids_S[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    return to, back, sizes


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
    rows = PartitionSpec(sharding.axes_that_split(mesh, "batch", x_BTD.shape[0]))
    return jax.shard_map(
        _on_mesh(plain, mesh, specs),
        mesh=mesh,
        in_specs=(specs, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )(*args)


def _on_mesh(plain: _Experts, mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> _Experts:
    """The experts of each device of a mesh."""

    def axis(logical: str) -> str:
        name = sharding.RULES[logical]
        return name if name in mesh.axis_names and mesh.shape[name] > 1 else ""

    width = axis("embed")
    gathers = tuple(
        (name, (width, tuple(spec).index(width)))
        for name, spec in specs.items()
        if width in tuple(spec)
    )
    return dataclasses.replace(
        plain,
        gathers=gathers if width else (),
        tensor=axis("mlp"),
        expert=axis("expert"),
        num_parts=sharding.mesh_axis_size(mesh, axis("expert") or None),
        everywhere=mesh.axis_names,
    )


# --- experts on other devices


class _Exchange(NamedTuple):
    """Where the rows of a device travel, in rounds of C rows to each device along `expert`.

    A round has room for somewhat more than an even choice of experts needs. Where the choice is
    less even there are more rounds, as many on all devices, and memory stays the same.
    """

    ids_S: jax.Array  # int32, the expert of each row among those of its device
    device_S: jax.Array  # int32; X where the row has no expert
    first_X: jax.Array  # int32, the first row of each device
    rows_X: jax.Array  # int32

    @property
    def places(self) -> int:
        """C."""
        (S,), X = self.ids_S.shape, len(self.rows_X)
        return -(-math.ceil(ROOM * S / X) // 8) * 8

    def rounds(self) -> jax.Array:
        return jnp.max(-(-self.rows_X // self.places))

    def round(self, number) -> tuple[jax.Array, jax.Array]:
        """(the row of each of the X C places, the place of each row) in a round, -1 for none."""
        (S,), X, C = self.ids_S.shape, len(self.rows_X), self.places
        at_XC = number * C + jnp.arange(C)
        row = jnp.where(at_XC < self.rows_X[:, None], self.first_X[:, None] + at_XC, -1)
        device = jnp.minimum(self.device_S, X - 1)
        at_S = jnp.arange(S) - self.first_X[device] - number * C
        here = (self.device_S < X) & (at_S >= 0) & (at_S < C)
        return row.reshape(-1), jnp.where(here, device * C + at_S, -1)


def _exchange(sizes_E: jax.Array, num_rows: int, num_parts: int) -> _Exchange:
    """The exchange of rows that are sorted by expert."""
    per_device = len(sizes_E) // num_parts
    ends_E = jnp.cumsum(sizes_E)
    expert_S = jnp.searchsorted(ends_E, jnp.arange(num_rows), side="right").astype(jnp.int32)
    rows_X = sizes_E.reshape(num_parts, -1).sum(1)
    first_X = jnp.cumsum(rows_X) - rows_X
    return _Exchange(expert_S % per_device, expert_S // per_device, first_X, rows_X)


def _one_round(experts: _Experts, exchange: _Exchange, number, params, rows, weights_S1, likes):
    """What the experts of all devices make of the rows that travel in this round, else 0."""
    row, place = exchange.round(number)
    per_device = params["experts_gate"].shape[0]

    def travel(x):
        return jax.lax.all_to_all(x, experts.expert, split_axis=0, concat_axis=0, tiled=True)

    ids = travel(jnp.where(row < 0, per_device, exchange.ids_S[jnp.maximum(row, 0)]))
    came, came_weights = (travel(grouped.moved(1, x, row, place)) for x in (rows, weights_S1))
    to, back, sizes = sorted_by(ids, per_device)
    came, came_weights = (grouped.moved(1, x, to, back) for x in (came, came_weights))
    y = experts.of_rows(params, likes, came, came_weights, sizes)
    return grouped.moved(1, travel(grouped.moved(1, y, back, to)), place, row)


def _whole(experts: _Experts, params, dtype):
    gathers = dict(experts.gathers)
    return {name: grouped.whole(gathers.get(name), p, dtype) for name, p in params.items()}


def _sum_of_rounds(experts: _Experts, exchange: _Exchange, one: Callable) -> Any:
    """The sum of `one(number)` over all rounds; there is always a first one."""

    @jax.jit
    def further_rounds(sums):  # `devices/flops.py` knows the name
        # All devices of the mesh turn as often, since they talk to each other in every round.
        rounds = jax.lax.pmax(exchange.rounds(), experts.everywhere)
        return jax.lax.fori_loop(
            1, rounds, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), sums
        )

    return further_rounds(one(0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(experts: _Experts, rows, weights_S1, params, sizes_E):
    """Rows sorted by expert through the experts of all devices along `expert`, weighted.

    The backward pass runs the experts again, round by round.
    """
    exchange = _exchange(sizes_E, len(rows), experts.num_parts)
    params = _whole(experts, params, rows.dtype)
    # Without a gather in the products: the parts are gathered once for all rounds.
    alone = dataclasses.replace(experts, gathers=())
    return _sum_of_rounds(
        experts,
        exchange,
        lambda i: _one_round(alone, exchange, i, params, rows, weights_S1, None),
    )


def _exchanged_backward(experts: _Experts, residuals, g):
    rows, weights_S1, params, sizes_E = residuals
    exchange = _exchange(sizes_E, len(rows), experts.num_parts)
    whole = _whole(experts, params, rows.dtype)
    likes = {name: jnp.zeros(p.shape, jnp.float32) for name, p in whole.items()}

    def one(i):
        def forward(rows, weights_S1, likes):
            return _one_round(experts, exchange, i, whole, rows, weights_S1, likes)

        return jax.vjp(forward, rows, weights_S1, likes)[1](g)

    d_rows, d_weights, d_params = _sum_of_rounds(experts, exchange, one)
    gathers = dict(experts.gathers)
    d_params = {
        name: grouped.parts(gathers.get(name), d).astype(params[name].dtype)
        for name, d in d_params.items()
    }
    return d_rows, d_weights, d_params, None


_exchanged.defvjp(
    lambda experts, *args: (_exchanged(experts, *args), args),
    _exchanged_backward,
)
