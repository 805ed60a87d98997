"""The architecture of a decoder as data: everything that differs between families of models."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.model.attention import GLOBAL_WINDOW, LayerInfo, Store
from adpo_jax.model.rope import Rope

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class ClampedGate:
    """An activation of two arguments: (up + 1) * gate * sigmoid(alpha * gate), of clamped ones.

    Attributes:
      alpha: how steep the sigmoid is.
      limit: gate is at most this, and up at most this on either side of 0.

    Source: https://github.com/openai/gpt-oss, `swiglu` of its torch model.
    """

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


ROUTERS = ("softmax", "softmax_of_chosen", "sigmoid", "sigmoid_of_inputs")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The mixture of experts that stands in place of the MLP.

    Attributes:
      num_experts: E.
      chosen: k, how many experts a token goes through.
      expert_size: hidden width of an expert.
      router: how logits become weights: "softmax" over all experts (Qwen, Mixtral, OLMoE), over the
        chosen ones alone (gpt-oss), or the "sigmoid" of each, where a bias takes part in the choice
        and in nothing else (GLM). With "sigmoid_of_inputs" there is no bias, and what weights would
        multiply is the input of the experts, not their output (Llama 4).
      normalised: whether the weights of the chosen experts are divided by their sum.
      scale: multiplies the weights at last.
      groups: parts that the experts are divided into; a token goes through experts of at most
        `chosen_groups` of them.
      shared_size: hidden width of the expert that every token goes through; 0 for none.
      shared_gate: whether a gate of each token weights the shared expert.
      biases: whether router and experts have biases (gpt-oss).
      beside_mlp: whether a layer has an MLP too, and the norms of the two results are summed. Then
        router and experts see hidden states before the norm of the MLP, each behind a norm of its
        own, and the weight of an expert is multiplied by a number of that expert (Gemma 4).
      block: the module of a checkpoint that holds the mixture: "mlp"; "block_sparse_moe", whose
        experts have w1, w3 and w2 (Mixtral); "feed_forward" (Llama 4); or "" for the layer itself
        (Gemma 4). The latter two have one tensor for a matrix of all experts, in which the outputs
        of up stand behind those of gate.
      alternating: whether, on disk, one tensor holds a matrix of all experts of a layer, in which
        the outputs of gate and up alternate (gpt-oss).
    """

    num_experts: int
    chosen: int
    expert_size: int
    router: str = "softmax"
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    shared_size: int = 0
    shared_gate: bool = False
    biases: bool = False
    beside_mlp: bool = False
    block: str = "mlp"
    alternating: bool = False

    def __post_init__(self):
        if self.router not in ROUTERS:
            raise ValueError(f"router {self.router!r} is not one of {ROUTERS}")
        if not 1 <= self.chosen <= self.num_experts:
            raise ValueError(
                f"a token goes through 1 to {self.num_experts} experts; given {self.chosen}"
            )
        if self.num_experts % self.groups or not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(
                f"{self.num_experts} experts do not divide into {self.groups} groups of which "
                f"{self.chosen_groups} are chosen"
            )
        if self.chosen > self.num_experts // self.groups * self.chosen_groups:
            raise ValueError(
                f"{self.chosen_groups} groups of {self.num_experts // self.groups} experts do not "
                f"hold the {self.chosen} experts of a token"
            )


@dataclasses.dataclass(frozen=True)
class GlobalLayers:
    """The attention of layers without a window, where it has other shapes (Gemma 4).

    Attributes:
      num_kv_heads, head_dim: as of `ModelConfig`, which are those of layers with a window.
      own_values: whether they have weights for values; else keys, before their norm and their
        rotation, are the values too.
    """

    num_kv_heads: int
    head_dim: int
    own_values: bool = True


@dataclasses.dataclass(frozen=True)
class LinearAttention:
    """The layers of linear attention, Gated DeltaNet, beside those of full attention (Qwen3-Next).

    Attributes:
      layers: for each layer of the model, whether it is one of them.
      num_key_heads, key_dim: of queries and keys.
      num_value_heads, value_dim: of values; so many value heads share a key head.
      taps: tokens that the convolution of queries, keys and values sees, the last one included.
      by_key_head: whether, on disk, one tensor holds the weights of queries, keys, values and gates
        by key head, and one those of the two numbers of each value head (Qwen3-Next, not Qwen3.5).
    """

    layers: tuple[bool, ...]
    num_key_heads: int
    key_dim: int
    num_value_heads: int
    value_dim: int
    taps: int
    by_key_head: bool

    def __post_init__(self):
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"the {self.num_value_heads} value heads of linear attention are not a multiple of "
                f"its {self.num_key_heads} key heads"
            )
        if all(self.layers):
            raise ValueError("a model of linear attention needs a layer of full attention too")

    @property
    def sharing(self) -> int:
        """The value heads of a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def group_size(self) -> int:
        """Queries, keys, values and gates of a key head."""
        return 2 * self.key_dim + 2 * self.sharing * self.value_dim

    @property
    def group_numbers(self) -> int:
        """Numbers of a key head that say how much is written and how much decays."""
        return 2 * self.sharing


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder.

    Attributes:
      windows: for each layer, how many tokens back it sees; None for all of them.
      ropes: the distinct rotary embeddings.
      layer_ropes: for each layer, its index into `ropes`.
      norm_plus_one: whether RMSNorm multiplies by 1 + w, not w (Gemma).
      pre_norms: whether a norm stands before attention and MLP (all but OLMo 2 and 3).
      post_norms: whether a norm follows attention and MLP, before the residual sum (Gemma 2 and 3,
        OLMo 2 and 3, GLM-4).
      norms_named_after_parts: whether, on disk, the norms after attention and MLP are named
        `post_self_attn_layernorm` and `post_mlp_layernorm`, and the norm before the MLP
        `post_attention_layernorm` (GLM-4).
      qk_norm: whether the queries and keys of each head have a norm.
      qk_norm_over_heads: whether all heads of a token have one norm together (OLMo 2 and 3).
      rope_interleaved: whether rotary embeddings turn neighbours, not the halves of a head (GLM-4).
      fused_qkv, fused_gate_up: whether these weights are one tensor on disk (Phi-3, GLM-4).
      embed_scale: whether embeddings are multiplied by sqrt(hidden_size) (Gemma).
      embed_multiplier: multiplies embeddings (Granite).
      residual_multiplier: multiplies what attention and MLP add to the hidden states (Granite).
      logit_divisor: divides the logits (Granite).
      attention_scale: multiplies q k^T; usually head_dim ** -0.5.
      activation: one of `ACTIVATIONS`, applied to the gate alone, or a `ClampedGate` (gpt-oss).
      attention_sinks: whether each head has a learned logit in the denominator of its softmax, as
        of a key without a value (gpt-oss; Xiao et al. 2023, arXiv 2309.17453).
      intermediate_size: hidden width of the dense MLP, of layers that have one.
      mixture: the mixture of experts of the layers; None where they have an MLP.
      mlp_layers: the numbers of the layers that have an MLP in place of the mixture: some at the
        start (GLM), or every other one (Llama 4 Maverick).
      global_layers: what layers without a window have otherwise than those with one; None where all
        layers have one shape.
      shared_kv_layers: how many layers at the end have no keys and values of their own, but those
        of the last layer of their kind before (Gemma 4).
      shared_mlp_size: hidden width of the MLP of those layers; 0 for `intermediate_size`.
      value_norm: whether the values of each head have a norm, without a weight (Gemma 4).
      per_layer_size: width of the embedding that every token has for each layer; 0 for none
        (Gemma 4 E2B and E4B).
      per_layer_vocab_size: rows of the table of these embeddings.
      chunks: for each layer, how many positions a chunk has, where queries see their chunk alone;
        None for no chunks, () for no chunks in any layer (Llama 4).
      qk_unit_norm: whether queries and keys of layers with a rotation have a norm after it, without
        a weight (Llama 4).
      mlp_module: the module of a checkpoint that holds the MLP.
      layer_scalar: whether the result of each layer is multiplied by a number of the checkpoint,
        which is not trained (Gemma 4).
      linear_attention: the layers of linear attention; None for a model without.
      gated_attention: whether a gate of each query multiplies what full attention gives
        (Qwen3-Next). The two have one weight.
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
    activation: str | ClampedGate = "silu"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norms_named_after_parts: bool = False
    embed_scale: bool = False
    embed_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    rope_interleaved: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    attention_sinks: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    mixture: Mixture | None = None
    mlp_layers: tuple[int, ...] = ()
    global_layers: GlobalLayers | None = None
    shared_kv_layers: int = 0
    shared_mlp_size: int = 0
    value_norm: bool = False
    per_layer_size: int = 0
    per_layer_vocab_size: int = 0
    layer_scalar: bool = False
    chunks: tuple[int | None, ...] = ()
    qk_unit_norm: bool = False
    mlp_module: str = "mlp"
    linear_attention: LinearAttention | None = None
    gated_attention: bool = False

    def __post_init__(self):
        if not isinstance(self.activation, ClampedGate) and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if not len(self.windows) == len(self.layer_ropes) == self.num_layers:
            raise ValueError("windows and layer_ropes need one entry a layer")
        if self.global_layers and self.num_heads % self.global_layers.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of the global layers' num_kv_heads "
                f"{self.global_layers.num_kv_heads}"
            )
        assert self.global_layers or not self.shared_kv_layers
        assert not (self.global_layers and self.linear_attention)

    @property
    def one(self) -> int:
        """The length of an axis that holds a single number."""
        return 1

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have a mixture."""
        each = range(self.num_layers if self.mixture else 0)
        return tuple(i for i in each if i not in self.mlp_layers)

    @property
    def gated_query_size(self) -> int:
        """Outputs for a head of the weight of queries and gates; gates are the second half."""
        return 2 * self.head_dim

    @property
    def num_mixtures(self) -> int:
        return len(self.mixture_layers)

    @property
    def mlps_first(self) -> bool:
        """Whether layers with a mixture stand behind all those without one."""
        return self.mlp_layers == tuple(range(len(self.mlp_layers)))

    @property
    def in_periods(self) -> bool:
        """Whether layers have different parameters in turn, so that a scan runs periods of them."""
        return self.has_two_kinds or not self.mlps_first

    @property
    def per_layer_width(self) -> int:
        """The width of a token's embeddings for all layers."""
        return self.num_layers * self.per_layer_size

    @property
    def layer_info(self) -> LayerInfo:
        """That of all layers, arrays [L]; `stores` has the rest."""
        windows, chunks = (
            [GLOBAL_WINDOW if size is None else size for size in sizes]
            for sizes in (self.windows, self.chunks)
        )
        return LayerInfo(
            index=np.arange(self.num_layers, dtype=np.int32),
            window=np.array(windows, np.int32),
            rope=np.array(self.layer_ropes, np.int32),
            place=np.array(self._places, np.int32) if self.has_two_kinds else None,
            chunk=np.array(chunks, np.int32) if chunks else None,
        )

    # --- layers of two kinds

    @property
    def has_two_kinds(self) -> bool:
        """Whether layers have two shapes of heads, or full and linear attention."""
        return bool(self.global_layers or self.linear_attention)

    def is_linear(self, layer: int) -> bool:
        """Whether a layer has linear attention."""
        return self.linear_attention is not None and self.linear_attention.layers[layer]

    def kind_of(self, layer: int) -> int:
        """0 for the kind of layers that the plain fields describe, 1 for the other one."""
        return int(self.is_global(layer) or self.is_linear(layer))

    def is_global(self, layer: int) -> bool:
        """Whether a layer has the shapes of `global_layers`."""
        return self.global_layers is not None and self.windows[layer] is None

    def has_own_keys(self, layer: int) -> bool:
        """Whether a layer has keys and values of its own."""
        return layer < self.num_layers - self.shared_kv_layers

    @property
    def stores(self) -> tuple[Store | None, ...]:
        """Where the memory of each layer lies; None where all layers are of one kind."""
        if not self.has_two_kinds:
            return (None,) * self.num_layers
        each = range(self.num_layers)
        return tuple(Store(self.kind_of(i), self.has_own_keys(i)) for i in each)

    @property
    def _places(self) -> list[int]:
        """The place of each layer's memory among those of its kind."""
        counts, places = [0, 0], []
        for store in self.stores:
            counts[store.kind] += store.written
            places.append(counts[store.kind] - 1)
        return places

    @property
    def kinds(self) -> tuple[tuple[int, int, int], ...]:
        """(layers with keys of their own, num_kv_heads, head_dim) of each kind that has keys."""
        if not self.global_layers:
            full = self.num_layers - sum(map(self.is_linear, range(self.num_layers)))
            return ((full, self.num_kv_heads, self.head_dim),)
        counts = collections.Counter(store.kind for store in self.stores if store.written)
        other = self.global_layers
        return (
            (counts[0], self.num_kv_heads, self.head_dim),
            (counts[1], other.num_kv_heads, other.head_dim),
        )

    @property
    def rope_head_dims(self) -> tuple[int, ...]:
        """The head dimension of the layers that have each rope."""
        dims = [self.head_dim] * len(self.ropes)
        for layer, rope in enumerate(self.layer_ropes):
            dims[rope] = self.global_layers.head_dim if self.is_global(layer) else self.head_dim
        return tuple(dims)
