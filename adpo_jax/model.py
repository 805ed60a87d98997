"""One Flax decoder for the Qwen, Llama, Mistral and Gemma families.

What differs between the families is data (`ModelConfig`); the layers are stacked on a leading axis
and run by a scan, so compile time does not grow with depth. The decoder returns hidden states: what
becomes of them (logits, log-probs) is the caller's choice, since [B, T, V] is the largest array of
all.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, F width of the MLP, V
vocabulary, L layers.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from adpo_jax import lora
from adpo_jax import rope as rope_lib
from adpo_jax.attention import GLOBAL_WINDOW, Attend, LayerInfo
from adpo_jax.cpu_fusion import kept
from adpo_jax.layer_functions import ACTIVATIONS, gated, project, rms_norm
from adpo_jax.rope import Rope
from adpo_jax.sharding import RULES, constrain, mesh_axis_size, partition_spec

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_dots": jax.checkpoint_policies.save_only_these_names("projection"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder.

    Attributes:
      windows: for each layer, how many tokens back it sees; None for all of them.
      ropes: the distinct rotary embeddings.
      layer_ropes: for each layer, its index into `ropes`.
      norm_plus_one: RMSNorm multiplies by 1 + w, not w (Gemma).
      post_norms: a second norm after attention and MLP, before the residual sum (Gemma 2 and 3).
      embed_scale: embeddings are multiplied by sqrt(hidden_size) (Gemma).
      attention_scale: multiplies q k^T; usually head_dim ** -0.5.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]
    attention_scale: float
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    post_norms: bool = False
    embed_scale: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not len(self.windows) == len(self.layer_ropes) == self.num_layers:
            raise ValueError("windows and layer_ropes need one entry a layer")

    @property
    def layer_info(self) -> LayerInfo:
        windows = [GLOBAL_WINDOW if w is None else w for w in self.windows]
        return LayerInfo(
            index=np.arange(self.num_layers, dtype=np.int32),
            window=np.array(windows, np.int32),
            rope=np.array(self.layer_ropes, np.int32),
        )


# Logical axes of every parameter, those of a layer without the leading "layers".
LAYER_AXES = {
    "attn_norm": ("norm",),
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "o_bias": ("norm",),
    "q_norm": ("norm",),
    "k_norm": ("norm",),
    "attn_post_norm": ("norm",),
    "mlp_norm": ("norm",),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "gate_bias": ("mlp",),
    "up_bias": ("mlp",),
    "down_bias": ("norm",),
    "mlp_post_norm": ("norm",),
}
for _weight in lora.INPUT_AXES:
    LAYER_AXES |= lora.adapter_axes(_weight, LAYER_AXES[_weight])
TOP_AXES = {
    "embed": ("vocab", "embed"),
    "final_norm": ("norm",),
    "head": ("embed", "vocab"),
}


def logical_axes(params) -> Any:
    """The tree of logical axes of a parameter tree.

    Raises:
      ValueError: naming the parameters that no table covers.
    """
    uncovered = []

    def axes_of(path, leaf):
        names = [key.key for key in path]
        if names[0] == "layers" and len(names) == 2 and names[1] in LAYER_AXES:
            return ("layers", *LAYER_AXES[names[1]])
        if len(names) == 1 and names[0] in TOP_AXES:
            return TOP_AXES[names[0]]
        uncovered.append(f"{'/'.join(names)} {tuple(leaf.shape)}")
        return ()

    axes = jax.tree_util.tree_map_with_path(axes_of, params)
    if uncovered:
        raise ValueError("no logical axes for the parameters: " + ", ".join(uncovered))
    return axes


def is_decayed(path: tuple[str, ...]) -> bool:
    """Whether weight decay applies: not to norms and biases."""
    return not path[-1].endswith(("norm", "bias"))


class Layer(nn.Module):
    """One pre-norm transformer block; the carry is (hidden [B, T, D], cache)."""

    config: ModelConfig
    attend: Attend
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None
    lora_scale: float

    def weight(self, name: str, *shape: int) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        if name.endswith("bias"):
            init = nn.initializers.zeros
        return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

    def dense(self, name: str, x: jax.Array, *out: int) -> jax.Array:
        """x [B, T, *in] times a weight [*in, *out], and through its adapter where it has one."""
        inputs = x.shape[2:]
        init = nn.initializers.normal(self.config.initializer_range)
        weight = self.param(name, init, (*inputs, *out), self.param_dtype)
        width = math.prod(inputs)
        y = project(x.reshape(*x.shape[:2], width), weight.reshape(width, -1))
        y = y.reshape(*x.shape[:2], *out)
        a, b = lora.names(name)
        if not self.has_variable("params", a):
            return y
        a, b = (self.get_variable("params", n).astype(self.dtype) for n in (a, b))
        return y + jnp.tensordot(self.lora_scale * jnp.tensordot(x, a, len(inputs)), b, 1)

    def norm(self, name: str, x: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        weight = self.param(name, init, x.shape[-1:], self.param_dtype)
        return rms_norm(x, weight, c.norm_eps, c.norm_plus_one)

    @nn.compact
    def __call__(self, carry, layer: LayerInfo, rope_tables):
        x, cache = carry
        attended, cache = self.attention(self.norm("attn_norm", x), layer, rope_tables, cache)
        if self.config.post_norms:
            attended = self.norm("attn_post_norm", attended)
        x = constrain(x + attended, self.mesh, "batch", "length", None)
        fed = self.mlp(self.norm("mlp_norm", x))
        if self.config.post_norms:
            fed = self.norm("mlp_post_norm", fed)
        x = constrain(x + fed, self.mesh, "batch", "length", None)
        return (x, cache), None

    def attention(self, x, layer: LayerInfo, rope_tables, cache):
        c = self.config
        D, H, K, h = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        if self.has_variable("params", "qkv"):
            heads = self.dense("qkv", x, (H + 2 * K) * h).reshape(*x.shape[:2], -1, h)
            q, k, v = jnp.split(heads, (H, H + K), axis=2)
        else:
            q, k, v = (self.dense(name, x, n, h) for name, n in (("q", H), ("k", K), ("v", K)))
        if c.qkv_bias:
            q = q + self.weight("q_bias", H, h)
            k = k + self.weight("k_bias", K, h)
            v = v + self.weight("v_bias", K, h)
        if c.qk_norm:
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        cos, sin = (table[layer.rope] for table in rope_tables)
        q, k = rope_lib.rotate(q, cos, sin), rope_lib.rotate(k, cos, sin)
        q = constrain(q, self.mesh, "batch", "length", "heads", None)
        k = constrain(k, self.mesh, "batch", "length", "kv_heads", None)
        v = constrain(v, self.mesh, "batch", "length", "kv_heads", None)
        attended, cache = self.attend(q, k, v, layer, cache)
        out = self.dense("o", attended, D)
        if c.out_bias:
            out = out + self.weight("o_bias", D)
        return out, cache

    def mlp(self, x):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size
        if self.has_variable("params", "gate_up"):
            gate, up = jnp.split(self.dense("gate_up", x, 2 * F), 2, axis=-1)
        else:
            gate, up = self.dense("gate", x, F), self.dense("up", x, F)
        if c.mlp_bias:
            gate, up = gate + self.weight("gate_bias", F), up + self.weight("up_bias", F)
        hidden = gated(c.activation, gate, up)
        hidden = constrain(hidden, self.mesh, "batch", "length", "mlp")
        down = self.dense("down", hidden, D)
        return down + self.weight("down_bias", D) if c.mlp_bias else down


class Decoder(nn.Module):
    """Embeds tokens and runs the stack of layers.

    Attributes:
      attend: what each layer's queries attend to, and where keys and values are kept.
      dtype: of the computation; norms, softmax and logits are float32 whatever it is.
      param_dtype: of the parameters at initialisation.
      remat: one of `REMAT_POLICIES`, what the backward pass recomputes.
      lora_scale: of the adapters that the parameters hold (`lora`).
    """

    config: ModelConfig
    attend: Attend
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    mesh: Mesh | None = None
    remat: str = "none"
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, cache=None):
        """Runs the model.

        Args:
          tokens, positions: [B, T] int32.
          cache: what `attend` keeps between calls, a pytree.

        Returns:
          hidden [B, T, D] after the final norm, in `dtype`, and the cache.
        """
        c = self.config
        V, D = c.vocab_size, c.hidden_size
        normal = nn.initializers.normal(c.initializer_range)
        embed = self.param("embed", normal, (V, D), self.param_dtype)
        x = embed_tokens(c, embed, tokens, self.dtype, self.mesh)
        x = constrain(x, self.mesh, "batch", "length", None)

        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
        )(
            c,
            self.attend,
            self.dtype,
            self.param_dtype,
            self.mesh,
            self.lora_scale,
            name="layers",
        )
        rope_tables = rope_lib.cos_sin(c.ropes, c.head_dim, positions)
        layers = jax.tree.map(jnp.asarray, c.layer_info)
        (x, cache), _ = stack((x, cache), layers, rope_tables)

        ones = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        final_norm = self.param("final_norm", ones, (D,), self.param_dtype)
        x = rms_norm(x, final_norm, c.norm_eps, c.norm_plus_one)
        if not c.tie_embeddings:
            self.param("head", normal, (D, V), self.param_dtype)
        return x, cache


def unrolled_forward(decoder: Decoder, params, tokens, positions, cache=None):
    """`decoder.apply`, its layers run one by one; the cache may be a tuple with one entry a layer.

    Compile time grows with depth, but no layer's parameters are sliced out of a stack: XLA's CPU
    compiler copies such a slice before a matrix product, which more than doubles a decode step.

    Args:
      params: as the decoder's, with `params["layers"]` a tuple of the layers' own trees.
    """
    c = decoder.config
    x = embed_tokens(c, params["embed"], tokens, decoder.dtype, decoder.mesh)
    x = constrain(x, decoder.mesh, "batch", "length", None)
    layer = Layer(
        c,
        decoder.attend,
        decoder.dtype,
        decoder.param_dtype,
        decoder.mesh,
        decoder.lora_scale,
        parent=None,
    )
    rope_tables = tuple(map(kept, rope_lib.cos_sin(c.ropes, c.head_dim, positions)))
    for i, layer_params in enumerate(params["layers"]):
        info = LayerInfo(*(leaf[i].item() for leaf in c.layer_info))
        (x, cache), _ = layer.apply({"params": layer_params}, (x, cache), info, rope_tables)
    x = rms_norm(x, params["final_norm"], c.norm_eps, c.norm_plus_one)
    return x, cache


def fused_layer(layer):
    """A layer's parameters with one matrix for q, k and v, and one for gate and up.

    Fewer and wider products: a tenth less time a decode step on a CPU. A layer with adapters stays
    as it is.
    """
    if any(map(lora.is_adapter, layer)):
        return layer
    rest = {k: v for k, v in layer.items() if k not in ("q", "k", "v", "gate", "up")}
    heads = [layer[name].reshape(layer[name].shape[0], -1) for name in ("q", "k", "v")]
    return {
        **rest,
        "qkv": jnp.concatenate(heads, axis=1),
        "gate_up": jnp.concatenate([layer["gate"], layer["up"]], axis=1),
    }


def embed_tokens(
    config: ModelConfig, embed: jax.Array, tokens: jax.Array, dtype, mesh: Mesh | None
) -> jax.Array:
    """Embeddings [B, T, D] of tokens [B, T]."""
    if mesh is not None and mesh.size > 1:
        x = _split_lookup(embed, tokens, dtype, mesh)
    else:
        x = jnp.take(embed, tokens, axis=0).astype(dtype)
    return x * jnp.asarray(config.hidden_size**0.5, dtype) if config.embed_scale else x


def _split_lookup(embed: jax.Array, tokens: jax.Array, dtype, mesh: Mesh) -> jax.Array:
    """Rows of a table that lies split over the mesh, without gathering it or its gradient.

    Each device looks the tokens of its `fsdp` group up in its own part of the table, and the parts
    change places: what moves is the size of the result. (The partitioner would gather the table,
    and sum its gradient whole on every device: 2.5 GB each for 152k tokens of width 4096.) Rows are
    cast after they are found, so that the gradient of a frequent token is summed in the table's
    dtype: in bfloat16, 4,096 times 0.01 come to 4.
    """
    if tokens.shape[0] % mesh_axis_size(mesh, RULES["batch"]):
        return jnp.take(constrain(embed, mesh, None, None), tokens, axis=0).astype(dtype)
    vocab, width = partition_spec(mesh, TOP_AXES["embed"], embed.shape)
    rows = RULES["batch"]

    def lookup(embed, tokens):
        tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        if vocab is None:
            x = jnp.take(embed, tokens, axis=0).astype(dtype)
        else:
            local = tokens - jax.lax.axis_index(vocab) * embed.shape[0]
            here = (local >= 0) & (local < embed.shape[0])
            x = jnp.take(embed, jnp.where(here, local, 0), axis=0).astype(dtype)
            x = jax.lax.psum(jnp.where(here[..., None], x, jnp.zeros((), dtype)), vocab)
        return jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        lookup,
        mesh=mesh,
        in_specs=(PartitionSpec(vocab, width), PartitionSpec(rows)),
        out_specs=PartitionSpec(rows),
    )(embed, tokens)


def head_logits(config: ModelConfig, params, hidden: jax.Array, mesh: Mesh | None = None):
    """Logits [..., V] float32 of hidden states [..., D]."""
    if "head" in params:
        spec, weight = "...d,dv->...v", params["head"]
    else:
        spec, weight = "...d,vd->...v", params["embed"]
    logits = jnp.einsum(
        spec, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
    return constrain(logits, mesh, "batch", *("length",) * (hidden.ndim - 2), "vocab")
