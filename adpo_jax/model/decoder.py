"""One decoder for all families of `hf/families.py`.

The decoder is plain functions over the parameter tree that `parameter_table` declares. Families
differ in data (`ModelConfig`). The uses of a model differ in two arguments: `attend` (which keys a
query sees, and where keys are kept) and `ffn` (what follows attention). The layers are stacked on a
leading axis and run by a scan, so compile time does not grow with depth; a tuple of layers, which
some compilers decode faster, and an unrolled scan are written out. The decoder returns hidden
states, and the caller chooses what to make of them (logits, log-probs), since [B, T, V] is the
largest array of all.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, h head dimension, F width of
the MLP, V vocabulary, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from adpo_jax.devices.sharding import constrain
from adpo_jax.model import layer_stacks, shared_keys, unstacked
from adpo_jax.model import rope as rope_lib
from adpo_jax.model.attention import Attend, LayerInfo, Turning
from adpo_jax.model.embedding import embed_tokens, per_layer_inputs
from adpo_jax.model.layer_weights import LayerWeights
from adpo_jax.model.layers import gated, rms_norm, unit_rms
from adpo_jax.model.linear_attention import Hybrid, Inputs
from adpo_jax.model.mixture import MixtureFfn
from adpo_jax.model.model_config import ModelConfig

# The name of the hidden states that come into a layer, for `jax.checkpoint`.
LAYER_INPUT = "layer_input"

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # What kernels of attention return is saved too: they are the dearest to run again.
    "save_dots": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    # As "full", and what is kept, the hidden states between layers, waits in the host's memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


# The part of a layer after attention: (weights, x [B, T, D], layer) -> (out [B, T, D], extras). The
# extras are a dict of arrays (a router's loss, say), which the decoder returns beside the hidden
# states.
Ffn = Callable[[LayerWeights, jax.Array, LayerInfo], tuple[jax.Array, dict[str, jax.Array]]]


@jax.named_scope("mlp")
def gated_mlp(weights: LayerWeights, x: jax.Array, layer: LayerInfo):
    """The dense `Ffn`: down(activation(gate x) * up x), without extras."""
    gate, up = weights.dense_each(x, "gate", "up")
    hidden = weights.gated(gate, up)
    hidden = constrain(hidden, weights.mesh, "batch", "length", "mlp")
    return weights.dense(hidden, "down"), {}


@jax.named_scope("attention")
def attention(
    weights: LayerWeights, x: jax.Array, layer: LayerInfo, rope_tables, cache, attend: Attend
):
    """Multi-head attention of x [B, T, D]; returns (out [B, T, D], cache)."""
    mesh = weights.mesh
    if not layer.writes:
        return _attention_to_shared_keys(weights, x, layer, rope_tables, cache, attend)
    if weights.has("gated_q"):
        q, k, v = weights.dense_each(x, "gated_q", "k", "v")
    elif weights.has("v"):
        q, k, v = weights.dense_each(x, "q", "k", "v")
    else:
        q, k = weights.dense_each(x, "q", "k")
        v = k
    gate = None
    if weights.config.gated_attention:
        q, gate = jnp.split(q, 2, axis=-1)
    if weights.config.value_norm:
        v = unit_rms(v, weights.config.norm_eps)
    cos, sin, scales = _tables_of(layer, rope_tables, q.shape[-1])
    if isinstance(attend, Turning) and weights.turns_plainly(cos, q.shape[-1]):
        attended, cache = attend.turn(weights.unturned(q, k, v, cos, sin), layer, cache)
        return weights.dense(_gated(attended, gate), "o"), cache
    q, k = (weights.norm_and_rotate(y, name, cos, sin) for y, name in ((q, "q"), (k, "k")))
    if weights.config.qk_unit_norm:
        is_rotated = [rope.kind != "none" for rope in weights.config.ropes]
        is_normed = jnp.asarray(is_rotated)[layer.rope]
        q, k = (jnp.where(is_normed, unit_rms(y, weights.config.norm_eps), y) for y in (q, k))
    for scale in scales:
        q = (q * scale[..., None]).astype(q.dtype)
    q = constrain(q, mesh, "batch", "length", "heads", None)
    k = constrain(k, mesh, "batch", "length", "kv_heads", None)
    v = constrain(v, mesh, "batch", "length", "kv_heads", None)
    if weights.config.attention_sinks:
        layer = layer._replace(sinks=weights.params["sinks"])
    attended, cache = attend(q, k, v, layer, cache)
    return weights.dense(_gated(attended, gate), "o"), cache


def _gated(attended: jax.Array, gate: jax.Array | None) -> jax.Array:
    return attended if gate is None else attended * jax.nn.sigmoid(gate)


@jax.named_scope("linear_attention")
def linear_attention(weights: LayerWeights, x: jax.Array, layer: LayerInfo, cache, attend: Hybrid):
    """Gated DeltaNet of x [B, T, D]; returns (out [B, T, D], cache)."""
    c, mesh, params = weights.config, weights.mesh, weights.params
    q, k, v, z, b, a = _linear_products(weights, x)
    q, k, v = (constrain(y, mesh, "batch", "length", "heads", None) for y in (q, k, v))
    b, a = b.astype(jnp.float32), a.astype(jnp.float32)
    rate = jnp.exp(params["linear_log_decay"].astype(jnp.float32))
    log_decay = -rate * jax.nn.softplus(a + params["linear_step_bias"].astype(jnp.float32))
    taps = (params[f"linear_conv_{name}"][..., 0, :] for name in ("q", "k", "v"))
    inputs = Inputs(q, k, v, log_decay, jax.nn.sigmoid(b), *taps)
    out, cache = attend.recur(inputs, layer, cache)
    out = rms_norm(out, params["linear_norm"], c.norm_eps, False)
    out = out * jax.nn.silu(z.astype(jnp.float32)).astype(out.dtype)
    return weights.dense(out, "linear_out"), cache


def _linear_products(weights: LayerWeights, x: jax.Array) -> list[jax.Array]:
    """Queries, keys [B, T, N, n], values, gates [B, T, M, m], and two numbers a value head."""
    linear = weights.config.linear_attention
    if not linear.by_key_head:
        names = ("q", "k", "v", "z", "b", "a")
        return [weights.dense(x, f"linear_{name}") for name in names]
    n, width = linear.key_dim, linear.sharing * linear.value_dim
    ends = (n, 2 * n, 2 * n + width)
    q, k, v, z = jnp.split(weights.dense(x, "linear_qkvz"), ends, axis=-1)
    b, a = jnp.split(weights.dense(x, "linear_ba"), 2, axis=-1)
    v, z = (y.reshape(*x.shape[:2], linear.num_value_heads, linear.value_dim) for y in (v, z))
    return [q, k, v, z, *(y.reshape(*x.shape[:2], linear.num_value_heads) for y in (b, a))]


def _attention_to_shared_keys(weights: LayerWeights, x, layer, rope_tables, cache, attend: Attend):
    """`attention` of a layer without keys and values; `attend` has those of an earlier layer."""
    q = weights.dense(x, "q")
    cos, sin, scales = _tables_of(layer, rope_tables, q.shape[-1])
    assert not scales, "queries of layers that share keys are not scaled"
    q = weights.norm_and_rotate(q, "q", cos, sin)
    q = constrain(q, weights.mesh, "batch", "length", "heads", None)
    attended, cache = attend(q, None, None, layer, cache)
    return weights.dense(attended, "o"), cache


def _tables_of(layer: LayerInfo, rope_tables, head_dim: int):
    """(cos, sin, scales of queries) of a layer, whose heads may be narrower than those of others.

    Most models have no scales, and the third is an empty list.
    """
    cos, sin, *scales = (table[layer.rope] for table in rope_tables)
    if cos.shape[-1] > head_dim // 2:
        cos, sin = cos[..., : head_dim // 2], sin[..., : head_dim // 2]
    return cos, sin, scales


def transformer_layer(
    weights: LayerWeights,
    x: jax.Array,
    layer: LayerInfo,
    rope_tables,
    cache,
    attend: Attend,
    ffn: Ffn,
):
    """One block of hidden states [B, T, D]; returns (hidden [B, T, D], cache, extras)."""
    normed = weights.norm(x, "attn_norm")
    if weights.has("linear_out"):
        attended, cache = linear_attention(weights, normed, layer, cache, attend)
    else:
        attended, cache = attention(weights, normed, layer, rope_tables, cache, attend)
    x = x + weights.to_residual(attended, "attn_post_norm")
    x = constrain(x, weights.mesh, "batch", "length", None)
    fed, extras = _fed(weights, x, layer, ffn)
    x = x + weights.to_residual(fed, "mlp_post_norm")
    if weights.has("per_layer_input"):
        x = x + weights.norm(_from_per_layer_input(weights, x), "per_layer_post_norm")
    if weights.has("layer_scalar"):
        scalar = jax.lax.stop_gradient(weights.params["layer_scalar"]).astype(jnp.float32)
        x = (x.astype(jnp.float32) * scalar).astype(x.dtype)
    return constrain(x, weights.mesh, "batch", "length", None), cache, extras


def _fed(weights: LayerWeights, x: jax.Array, layer: LayerInfo, ffn: Ffn):
    """What the part after attention makes of hidden states x [B, T, D], and its extras."""
    mixture, normed = weights.config.mixture, weights.norm(x, "mlp_norm")
    if not mixture or not mixture.beside_mlp:
        return ffn(weights, normed, layer)
    beside, _ = gated_mlp(weights, normed, layer)
    routed, extras = ffn(weights, x, layer)
    beside = weights.norm(beside, "beside_post_norm")
    return beside + weights.norm(routed, "experts_post_norm"), extras


def _from_per_layer_input(weights: LayerWeights, x: jax.Array) -> jax.Array:
    """What the embeddings of this layer add to x [B, T, D]."""
    own = weights.params["per_layer_input"]
    opened = gated(weights.config.activation, weights.dense(x, "per_layer_gate"), own)
    return weights.dense(opened, "per_layer_out")


def decoder(
    config: ModelConfig,
    params,
    tokens: jax.Array,
    positions: jax.Array,
    cache=None,
    *,
    attend: Attend,
    ffn: Ffn | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    remat: str = "none",
    scan_layers: bool = True,
    lora_scale: float = 1.0,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Embeds tokens and runs the stack of layers.

    Args:
      params: the tree of `random_weights.init`, perhaps with adapters; or that of
        `unstacked.decoding_params`, a tuple of layers that run one by one.
      tokens, positions: [B, T] int32.
      cache: a pytree that `attend` keeps between calls; where layers run one by one, it may be a
        tuple with one entry a layer.
      attend: decides what each layer's queries attend to, and where keys and values are kept; a
        `Hybrid` for a model with layers of linear attention.
      ffn: the part of each layer after attention; None for the model's own. It takes the place of
        the mixture, where there is one: a layer that has an MLP instead keeps that, and a layer
        with both runs its MLP beside `ffn`, which then gets hidden states before their norm.
      dtype: dtype of the computation; norms, softmax and logits are float32 whatever it is.
      remat: what the backward pass recomputes of stacked layers, one of `REMAT_POLICIES`.
      scan_layers: whether stacked layers are the turns of a loop, which compiles fast; False writes
        them one after the other, and what each keeps for the backward pass is an array of its own
        in place of a copy into a stack.
      lora_scale: scale of the adapters.

    Returns:
      (hidden [B, T, D] after the final norm, in `dtype`; the cache; the extras of `ffn`, each
      stacked over the layers, [L, ...], those without a mixture left out).
    """
    if ffn is None:
        ffn = MixtureFfn() if config.mixture else gated_mlp
    x = embed_tokens(config, params["embed"], tokens, dtype, mesh)
    x = constrain(x, mesh, "batch", "length", None)
    if config.shared_kv_layers:
        attend = shared_keys.sharing_keys(attend)
        cache = cache, shared_keys.no_keys_yet(config, tokens.shape, dtype, mesh)

    def run_layer(carry, layer_params, layer: LayerInfo, rope_tables):
        if config.global_layers:
            layer_params = layer_stacks.plainly_named(layer_params)
        weights = LayerWeights(layer_params, config, dtype, mesh, lora_scale)
        lacks_mixture = config.mixture and "experts_router" not in layer_params
        layer_ffn = gated_mlp if lacks_mixture else ffn
        x = checkpoint_name(carry[0], LAYER_INPUT)
        x, cache, extras = transformer_layer(
            weights, x, layer, rope_tables, carry[1], attend, layer_ffn
        )
        return (x, cache), extras

    rope_tables = rope_lib.cos_sin(config.ropes, config.rope_head_dims, positions)
    rope_tables += rope_lib.query_scales(config.ropes, positions)
    layer_inputs = None
    if config.per_layer_size:
        layer_inputs = per_layer_inputs(config, params, tokens, x, mesh)
    (x, cache), extras = _run_stack(
        config,
        run_layer,
        (x, cache),
        params["layers"],
        rope_tables,
        layer_inputs,
        remat=remat,
        scan_layers=scan_layers,
    )
    if config.shared_kv_layers:
        cache, _ = cache
    x = rms_norm(x, params["final_norm"], config.norm_eps, config.norm_plus_one)
    return x, cache, extras


def _run_stack(
    config: ModelConfig,
    run_layer: Callable,
    carry,
    layers,
    rope_tables,
    layer_inputs: jax.Array | None,
    *,
    remat: str,
    scan_layers: bool,
) -> tuple[Any, dict[str, jax.Array]]:
    """Runs the layers: a tuple of them one by one, stacked ones by scans.

    Args:
      run_layer: (carry, layer's parameters, `LayerInfo`, rope tables) -> (carry, extras).
      layers, remat, scan_layers: as for `decoder`.
      layer_inputs: [L, B, T, P], the layers' own embeddings; None for none.

    Returns:
      (carry, extras stacked over the layers that have them).
    """
    info = config.layer_info
    if isinstance(layers, tuple):
        if layer_inputs is not None:
            layers = tuple(p | {"per_layer_input": y} for p, y in zip(layers, layer_inputs))

        def run_one(carry, layer_params, layer: LayerInfo, rope_tables):
            layer = layer._replace(store=config.stores[layer.index])
            return run_layer(carry, layer_params, layer, rope_tables)

        return unstacked.layer_by_layer(run_one, carry, layers, info, rope_tables)
    if config.in_periods:
        return layer_stacks.scan_periods(
            config,
            lambda *layer: run_layer(*layer, rope_tables),
            carry,
            layers,
            info,
            layer_inputs,
            functools.partial(_recomputed, remat=remat, scanned=scan_layers),
            unroll=not scan_layers,
        )

    def run(carry, params_and_info):
        return run_layer(carry, *params_and_info, rope_tables)

    run = _recomputed(run, remat, scanned=scan_layers)
    all_extras = []
    for part, _ in layer_stacks.stretches(config):
        part_params = layer_stacks.layers_of(layers, config, part)
        part_info = info.of(slice(part.start, part.stop), jnp.asarray)
        carry, extras = jax.lax.scan(run, carry, (part_params, part_info), unroll=not scan_layers)
        all_extras += [extras] if extras else []
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *all_extras or [{}])


def _recomputed(run: Callable, remat: str, *, scanned: bool) -> Callable:
    """A layer of which the backward pass recomputes what `remat` says."""
    if remat == "none":
        return run
    # Outside of a loop the compiler would find the first result again and keep it.
    return jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=not scanned)


def head_logits(config: ModelConfig, params, hidden: jax.Array, mesh: Mesh | None = None):
    """Logits [..., V] float32 of hidden states [..., D]."""
    if "head" in params:
        spec, weight = "...d,dv->...v", params["head"]
    else:
        spec, weight = "...d,vd->...v", params["embed"]
    logits = jnp.einsum(
        spec, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if config.logit_divisor != 1.0:
        logits = logits / config.logit_divisor
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    return constrain(logits, mesh, "batch", *("length",) * (hidden.ndim - 2), "vocab")
