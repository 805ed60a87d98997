"""Every parameter of a model, declared in a table: one row for each form that it has on disk.

The rows decide the tree of random parameters (`random_weights`), its layout on a mesh
(`logical_axes`), the tensors of a Hugging Face folder (`hf/tensors.py`), adapters (`lora`), weight
decay (`update/optimizer.py`), the dtypes of decoding (`engine/verbs.py`) and the matrices that a
CPU joins (`cpu`). A new parameter is a row here and a line in the function that uses it.

Letters, the axes of a parameter: V vocabulary, D model width, d model width of a vector, H heads, K
key/value heads, h head dimension, F width of the MLP, R rank of an adapter, E experts, f width of
an expert, S width of the shared expert, 1 a single number; of layers without a window where they
differ, G key/value heads, g head dimension; W width of the MLP of layers that share keys; of the
embeddings for each layer, U vocabulary, P width (p of a vector), Q width of all layers (q not
split); j outputs for a head of queries that have gates; of linear attention, N key heads, n key
dimension, M value heads, m value dimension, t taps of the convolution, X and Y what a key head has
of a fused weight. Parameters of a layer have a leading axis of the layers, which the rows leave
out.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adpo_jax.model.model_config import ModelConfig


class Axis(NamedTuple):
    """The meaning of a letter."""

    size: str | None  # the field of `ModelConfig` that is its length; None if none is
    logical: str | None  # its name in `sharding.RULES`; None if it is never split


AXES = {
    "V": Axis("vocab_size", "vocab"),
    "D": Axis("hidden_size", "embed"),
    "d": Axis("hidden_size", "norm"),  # never split: a vector is small and every device needs it
    "H": Axis("num_heads", "heads"),
    "K": Axis("num_kv_heads", "kv_heads"),
    "h": Axis("head_dim", "head_dim"),
    "F": Axis("intermediate_size", "mlp"),
    "R": Axis(None, "rank"),
    "E": Axis("mixture.num_experts", "expert"),
    "f": Axis("mixture.expert_size", "mlp"),
    "S": Axis("mixture.shared_size", "mlp"),
    "1": Axis("one", None),
    "G": Axis("global_layers.num_kv_heads", "kv_heads"),
    "g": Axis("global_layers.head_dim", "head_dim"),
    "W": Axis("shared_mlp_size", "mlp"),
    "U": Axis("per_layer_vocab_size", "vocab"),
    "P": Axis("per_layer_size", "mlp"),
    "p": Axis("per_layer_size", "norm"),
    "Q": Axis("per_layer_width", "embed"),
    "q": Axis("per_layer_width", None),
    "j": Axis("gated_query_size", "head_dim"),
    "N": Axis("linear_attention.num_key_heads", "heads"),
    "n": Axis("linear_attention.key_dim", "head_dim"),
    "M": Axis("linear_attention.num_value_heads", "heads"),
    "m": Axis("linear_attention.value_dim", "head_dim"),
    "t": Axis("linear_attention.taps", None),
    "X": Axis("linear_attention.group_size", None),
    "Y": Axis("linear_attention.group_numbers", None),
}

# Which layers have a parameter; `Parameter.layers` says what each name means.
LAYERS = {"all", "mlp", "mixture", "shared", "linear", "local", "local_kv", "global", "global_kv"}

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def _normal(config: ModelConfig) -> Initializer:
    return nn.initializers.normal(config.initializer_range)


def _zeros(config: ModelConfig) -> Initializer:
    return nn.initializers.zeros


def _ones(config: ModelConfig) -> Initializer:
    return nn.initializers.ones


def _log_uniform(config: ModelConfig) -> Initializer:
    """The initializer of the logs of decays, as transformers draws them."""

    def draw(key, shape, dtype):
        return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0)).astype(dtype)

    return draw


def _identity(config: ModelConfig) -> Initializer:
    """The initializer of a norm that leaves the scale as it is."""
    return nn.initializers.zeros if config.norm_plus_one else nn.initializers.ones


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table.

    Attributes:
      name: its name in the parameter tree.
      axes: its letters in the tree.
      hf_name: its tensor in a checkpoint, below `model.layers.<i>.` for a parameter of a layer.
        Rows of a model that have one tensor are its parts along the axis `parted`. "{}" is the
        number of the expert, if each has a tensor of its own.
      hf_axes: the same letters on disk; "Hh D" is a matrix [H * h, D]. The first letter is E, the
        number in the name, where each expert has a tensor of its own.
      parted: the axis on disk along which rows that have one tensor are its parts.
      alternates: whether the rows that have one tensor take turns along its last axis instead.
      when: whether a model has it. Rows of one name differ in this, in their form on disk and in
        whether they may have an adapter.
      init: how random weights are drawn; None for adapters, which `Lora.init` draws.
      decays: whether weight decay applies.
      wide: whether decoding leaves it in the dtype of the parameters, since the arithmetic with it
        is float32 whatever the dtype of the computation.
      is_float32: whether it is float32 in memory and on disk whatever the other parameters are, as
        transformers keeps it: rounded, the bias of a router would choose other experts.
      adapter_inputs: how many leading axes the A of an adapter sums over, that of the experts not
        counted; 0 if the parameter may have no adapter.
      turned_in_peft: whether peft takes its inputs for outputs, so that peft's A and B are the B
        and A of this adapter (Llama 4, whose experts do not say which is which).
      joined: the name of the matrix that `cpu` makes of this parameter and the others with the same
        input; "" for none.
      layers: the layers that have it, one of `LAYERS`: "all", or those with an MLP ("mlp") or a
        mixture ("mixture"). Where layers without a window have other shapes, "local" are those with
        one and "global" those without; "local_kv" and "global_kv" are those of them that have keys
        of their own.
        "shared" are the layers without. Where a layer has a row of a wider MLP or of the global
        layers, its name is that of the plain row behind a prefix of `PREFIXES`. "linear" are those
        of linear attention, beside which the "local" ones are all others.
    """

    name: str
    axes: str
    hf_name: str
    hf_axes: str
    when: Callable[[ModelConfig], bool] = lambda config: True
    init: Callable[[ModelConfig], Initializer] | None = _normal
    decays: bool = True
    wide: bool = False
    is_float32: bool = False
    adapter_inputs: int = 0
    turned_in_peft: bool = False
    joined: str = ""
    layers: str = "all"
    alternates: bool = False
    parted: int = 0

    def __post_init__(self):
        assert self.layers in LAYERS, f"{self.name}: layers={self.layers!r} is none of {LAYERS}"

    def dtype(self, of_others: Any) -> Any:
        """Its dtype beside parameters of another one."""
        return jnp.float32 if self.is_float32 else of_others

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Its shape in a model, without the layer axis."""
        return tuple(operator.attrgetter(AXES[letter].size)(config) for letter in self.axes)

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        return tuple(AXES[letter].logical for letter in self.axes)

    @property
    def experts(self) -> str:
        """The letter of the experts if it has weights of each, else ""."""
        return self.axes[:1] if self.axes[:1] == "E" else ""

    @property
    def one_tensor_for_all(self) -> bool:
        """Whether one tensor of a layer holds the matrices of all experts."""
        return bool(self.experts) and not self.one_tensor_each

    @property
    def one_tensor_each(self) -> bool:
        """Whether each expert has a tensor of its own on disk."""
        return "{}" in self.hf_name

    def layers_of(self, config: ModelConfig) -> Sequence[int]:
        """The numbers of the layers that have it."""
        first, last = 0, config.num_layers
        if self.layers == "mixture":
            return config.mixture_layers
        if self.layers == "mlp" and config.mixture and not config.mixture.beside_mlp:
            return config.mlp_layers
        if self.layers == "mlp" and config.shared_mlp_size:
            last -= config.shared_kv_layers
        elif self.layers == "shared":
            first = last - config.shared_kv_layers
        elif self.layers.startswith(("local", "global")) and config.global_layers:
            last -= config.shared_kv_layers if self.layers.endswith("_kv") else 0
            is_global = self.layers.startswith("global")
            return tuple(i for i in range(last) if config.is_global(i) == is_global)
        elif self.layers.startswith(("local", "linear")) and config.linear_attention:
            is_linear = self.layers == "linear"
            return tuple(i for i in range(last) if config.is_linear(i) == is_linear)
        return range(first, last)

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from the letters on disk to those of the tree."""
        return tuple(self.hf_axes.replace(" ", "").index(letter) for letter in self.axes)

    @property
    def hf_module(self) -> str:
        """The Hugging Face module that holds it, or its own name there if it is no `weight`."""
        return self.hf_name.removesuffix(".weight")

    def adapter(self) -> tuple["Parameter", "Parameter"]:
        """The rows of its A [*in, R] and B [R, *out], which peft keeps as [R, in] and [out, R]."""
        experts, axes = self.experts, self.axes.removeprefix(self.experts)
        inputs, outputs = axes[: self.adapter_inputs], axes[self.adapter_inputs :]
        (a, b), module, layers = adapter_names(self.name), self.hf_module, self.layers

        def row(name, axes, tensor, hf_axes):
            hf_axes = f"{experts} {hf_axes}".strip()
            hf_name = f"{module}.{tensor}.weight"
            return Parameter(name, experts + axes, hf_name, hf_axes, init=None, layers=layers)

        return (
            row(a, f"{inputs}R", "lora_A", f"R {inputs}"),
            row(b, f"R{outputs}", "lora_B", f"{outputs} R"),
        )


def _norm(name: str, axes: str, hf_name: str, **settings) -> Parameter:
    return Parameter(name, axes, hf_name, axes, init=_identity, decays=False, wide=True, **settings)


def _bias(name: str, axes: str, hf_name: str, **settings) -> Parameter:
    return Parameter(name, axes, hf_name, axes, init=_zeros, decays=False, **settings)


def _input(name: str, axes: str, module: str, hf_axes: str, **settings) -> Parameter:
    """A weight [in, *out] of a layer that reads the width of the model."""
    return Parameter(name, axes, f"{module}.weight", hf_axes, adapter_inputs=1, **settings)


def _post_norms(config: ModelConfig) -> bool:
    return config.post_norms and not config.norms_named_after_parts


def _named_after_parts(config: ModelConfig) -> bool:
    return config.post_norms and config.norms_named_after_parts


def _fused_qkv(config: ModelConfig) -> bool:
    return config.fused_qkv


def _separate_qkv(config: ModelConfig) -> bool:
    return not config.fused_qkv


def _plain_q(config: ModelConfig) -> bool:
    return not config.fused_qkv and not config.gated_attention


def _expert(name: str, axes: str, hf_name: str, hf_axes: str, **settings) -> Parameter:
    """A row of a mixture, in the layers that have one."""
    return Parameter(name, axes, hf_name, hf_axes, layers="mixture", **settings)


def _has_mlp(config: ModelConfig) -> bool:
    return config.mixture is None or config.mixture.beside_mlp or bool(config.mlp_layers)


def _global(name: str, make: Callable[..., Parameter], *row, **settings) -> Parameter:
    """The row for layers without a window, of a parameter with another shape in the others."""
    when = settings.pop("when", _always)
    settings = {"layers": "global", **settings}
    return make(
        f"global_{name}", *row, when=lambda c: c.global_layers is not None and when(c), **settings
    )


def _always(config: ModelConfig) -> bool:
    return True


def _wide(name: str, axes: str, hf_name: str, hf_axes: str) -> Parameter:
    """A row of the MLP of layers that share keys, where it is wider than that of others."""
    return Parameter(
        f"wide_{name}",
        axes,
        hf_name,
        hf_axes,
        when=lambda c: c.shared_mlp_size > 0,
        adapter_inputs=1,
        layers="shared",
    )


def _per_layer(config: ModelConfig) -> bool:
    return config.per_layer_size > 0


def _linear(name: str, axes: str, hf_name: str, hf_axes: str, **settings) -> Parameter:
    """A row of linear attention; `fused` says which form on disk has it, where one alone has."""
    fused = settings.pop("fused", None)

    def has(config: ModelConfig) -> bool:
        linear = config.linear_attention
        return linear is not None and fused in (None, linear.fused)

    name, hf_name = f"linear_{name}", f"linear_attn.{hf_name}"
    return Parameter(name, axes, hf_name, hf_axes, when=has, layers="linear", **settings)


_FUSED: dict[str, Any] = {"fused": True, "adapter_inputs": 1}
_SEPARATE: dict[str, Any] = {"fused": False, "adapter_inputs": 1}
# A number for each head, with which the arithmetic is float32.
_OF_HEAD: dict[str, Any] = {"decays": False, "wide": True}
_LOCAL: dict[str, Any] = {"layers": "local"}
_LOCAL_KV: dict[str, Any] = {"layers": "local_kv"}
_MLP: dict[str, Any] = {"when": _has_mlp, "layers": "mlp"}
_FUSED_GATE = _MLP | {"when": lambda c: _has_mlp(c) and c.fused_gate_up}
_SEPARATE_GATE = _MLP | {
    "when": lambda c: _has_mlp(c) and not c.fused_gate_up and c.mlp_module == "mlp"
}
_PLAIN_DOWN = _MLP | {"when": lambda c: _has_mlp(c) and c.mlp_module == "mlp"}
_FEED_FORWARD = _MLP | {"when": lambda c: _has_mlp(c) and c.mlp_module == "feed_forward"}


def _mixture(has: Callable[[Any], Any] = lambda mixture: True) -> Callable[[ModelConfig], bool]:
    """Whether a model has a mixture of which this is so."""
    return lambda config: config.mixture is not None and bool(has(config.mixture))


_EXPERTS = _mixture(lambda m: m.block == "mlp" and not m.fused)
_FUSED_EXPERTS = _mixture(lambda m: m.fused)
_LLAMA4 = _mixture(lambda m: m.block == "feed_forward")
_GEMMA4 = _mixture(lambda m: m.beside_mlp)
_EXPERT_BIASES = _mixture(lambda m: m.biases)
_MIXTRAL = _mixture(lambda m: m.block == "block_sparse_moe")
_SHARED = _mixture(lambda m: m.shared_size and m.shared_gate)
_SHARED_PLAIN = _mixture(lambda m: m.shared_size and not m.shared_gate and m.block == "mlp")


_EXPERT_BIAS: dict[str, Any] = {"init": _zeros, "decays": False}
_ALTERNATING: dict[str, Any] = {"alternates": True, "adapter_inputs": 1}
_ALTERNATING_BIAS = _EXPERT_BIAS | {"alternates": True}

# The order of the rows is part of a seed's meaning: flax counts a parameter's key by its place.
TOP = (
    Parameter("embed", "VD", "model.embed_tokens.weight", "V D"),
    _norm("final_norm", "d", "model.norm.weight"),
    Parameter("head", "DV", "lm_head.weight", "V D", when=lambda c: not c.tie_embeddings),
    Parameter(
        "per_layer_embed", "UQ", "model.embed_tokens_per_layer.weight", "U Q", when=_per_layer
    ),
    Parameter(
        "per_layer_context", "Dq", "model.per_layer_model_projection.weight", "q D", when=_per_layer
    ),
    _norm("per_layer_norm", "p", "model.per_layer_projection_norm.weight", when=_per_layer),
)
LAYER = (
    _norm("attn_norm", "d", "input_layernorm.weight", when=lambda c: c.pre_norms),
    _input("q", "DHh", "self_attn.q_proj", "Hh D", joined="qkv", when=_plain_q, **_LOCAL),
    _input("k", "DKh", "self_attn.k_proj", "Kh D", joined="qkv", when=_separate_qkv, **_LOCAL_KV),
    _input("v", "DKh", "self_attn.v_proj", "Kh D", joined="qkv", when=_separate_qkv, **_LOCAL_KV),
    # Rows with one tensor are its parts, in this order.
    _input("q", "DHh", "self_attn.qkv_proj", "Hh D", joined="qkv", when=_fused_qkv, **_LOCAL),
    _input("k", "DKh", "self_attn.qkv_proj", "Kh D", joined="qkv", when=_fused_qkv, **_LOCAL_KV),
    _input("v", "DKh", "self_attn.qkv_proj", "Kh D", joined="qkv", when=_fused_qkv, **_LOCAL_KV),
    _bias("q_bias", "Hh", "self_attn.q_proj.bias", when=lambda c: c.qkv_bias),
    _bias("k_bias", "Kh", "self_attn.k_proj.bias", when=lambda c: c.qkv_bias),
    _bias("v_bias", "Kh", "self_attn.v_proj.bias", when=lambda c: c.qkv_bias),
    _norm("q_norm", "h", "self_attn.q_norm.weight", when=lambda c: c.qk_norm, **_LOCAL),
    _norm("k_norm", "h", "self_attn.k_norm.weight", when=lambda c: c.qk_norm, **_LOCAL_KV),
    _norm("q_norm_all", "Hh", "self_attn.q_norm.weight", when=lambda c: c.qk_norm_over_heads),
    _norm("k_norm_all", "Kh", "self_attn.k_norm.weight", when=lambda c: c.qk_norm_over_heads),
    # A logit each, and the softmax is float32.
    Parameter(
        "sinks",
        "H",
        "self_attn.sinks",
        "H",
        when=lambda c: c.attention_sinks,
        decays=False,
        wide=True,
    ),
    Parameter("o", "HhD", "self_attn.o_proj.weight", "D Hh", adapter_inputs=2, **_LOCAL),
    _bias("o_bias", "d", "self_attn.o_proj.bias", when=lambda c: c.out_bias),
    # Some models have a norm on either side of attention and MLP, so a name has several places.
    _norm("attn_post_norm", "d", "post_attention_layernorm.weight", when=_post_norms),
    _norm("attn_post_norm", "d", "post_self_attn_layernorm.weight", when=_named_after_parts),
    _norm(
        "mlp_norm",
        "d",
        "pre_feedforward_layernorm.weight",
        when=lambda c: c.pre_norms and _post_norms(c),
    ),
    _norm(
        "mlp_norm",
        "d",
        "post_attention_layernorm.weight",
        when=lambda c: c.pre_norms and not _post_norms(c),
    ),
    _input("gate", "DF", "mlp.gate_proj", "F D", joined="gate_up", **_SEPARATE_GATE),
    _input("up", "DF", "mlp.up_proj", "F D", joined="gate_up", **_SEPARATE_GATE),
    _input("gate", "DF", "feed_forward.gate_proj", "F D", joined="gate_up", **_FEED_FORWARD),
    _input("up", "DF", "feed_forward.up_proj", "F D", joined="gate_up", **_FEED_FORWARD),
    _input("gate", "DF", "mlp.gate_up_proj", "F D", joined="gate_up", **_FUSED_GATE),
    _input("up", "DF", "mlp.gate_up_proj", "F D", joined="gate_up", **_FUSED_GATE),
    _bias("gate_bias", "F", "mlp.gate_proj.bias", when=lambda c: c.mlp_bias),
    _bias("up_bias", "F", "mlp.up_proj.bias", when=lambda c: c.mlp_bias),
    Parameter("down", "FD", "mlp.down_proj.weight", "D F", adapter_inputs=1, **_PLAIN_DOWN),
    Parameter(
        "down", "FD", "feed_forward.down_proj.weight", "D F", adapter_inputs=1, **_FEED_FORWARD
    ),
    _bias("down_bias", "d", "mlp.down_proj.bias", when=lambda c: c.mlp_bias),
    _norm("mlp_post_norm", "d", "post_feedforward_layernorm.weight", when=_post_norms),
    _norm("mlp_post_norm", "d", "post_mlp_layernorm.weight", when=_named_after_parts),
    _expert("experts_router", "DE", "mlp.gate.weight", "E D", when=_EXPERTS, wide=True),
    _expert(
        "experts_router", "DE", "block_sparse_moe.gate.weight", "E D", when=_MIXTRAL, wide=True
    ),
    _expert("experts_router", "DE", "mlp.router.weight", "E D", when=_FUSED_EXPERTS, wide=True),
    _expert(
        "experts_router_bias",
        "E",
        "mlp.router.bias",
        "E",
        when=_EXPERT_BIASES,
        decays=False,
        wide=True,
    ),
    _expert(
        "experts_bias",
        "E",
        "mlp.gate.e_score_correction_bias",
        "E",
        when=_mixture(lambda m: m.router == "sigmoid"),
        init=_zeros,
        decays=False,
        wide=True,
        is_float32=True,
    ),
    # Experts lie in the order of the layers on disk too, each with three matrices of its own.
    *(
        _expert(f"experts_{name}", axes, hf_name, hf_axes, when=when, adapter_inputs=1)
        for name, axes, hf_axes, theirs, mixtrals in (
            ("gate", "EDf", "E f D", "gate_proj", "w1"),
            ("up", "EDf", "E f D", "up_proj", "w3"),
            ("down", "EfD", "E D f", "down_proj", "w2"),
        )
        for when, hf_name in (
            (_EXPERTS, f"mlp.experts.{{}}.{theirs}.weight"),
            (_MIXTRAL, f"block_sparse_moe.experts.{{}}.{mixtrals}.weight"),
        )
    ),
    *(
        _expert(f"experts_{name}", axes, f"mlp.experts.{theirs}", hf_axes, when=when, **settings)
        for name, axes, hf_axes, theirs, when, settings in (
            ("gate", "EDf", "E D f", "gate_up_proj", _FUSED_EXPERTS, _ALTERNATING),
            ("up", "EDf", "E D f", "gate_up_proj", _FUSED_EXPERTS, _ALTERNATING),
            ("down", "EfD", "E f D", "down_proj", _FUSED_EXPERTS, {"adapter_inputs": 1}),
            ("gate_bias", "Ef", "E f", "gate_up_proj_bias", _EXPERT_BIASES, _ALTERNATING_BIAS),
            ("up_bias", "Ef", "E f", "gate_up_proj_bias", _EXPERT_BIASES, _ALTERNATING_BIAS),
            ("down_bias", "Ed", "E d", "down_proj_bias", _EXPERT_BIASES, _EXPERT_BIAS),
        )
    ),
    *(
        _expert(f"shared_{name}", axes, hf_name, hf_axes, when=when, adapter_inputs=1)
        for name, axes, hf_axes in (
            ("gate", "DS", "S D"),
            ("up", "DS", "S D"),
            ("down", "SD", "D S"),
        )
        for when, hf_name in (
            (_SHARED, f"mlp.shared_expert.{name}_proj.weight"),
            (_SHARED_PLAIN, f"mlp.shared_experts.{name}_proj.weight"),
        )
    ),
    _expert("shared_router", "D1", "mlp.shared_expert_gate.weight", "1 D", when=_SHARED),
    # Layers of other shapes: new rows stand at the end, since the place of a weight is part of a
    # seed's meaning for adapters too.
    _global("q", _input, "DHg", "self_attn.q_proj", "Hg D"),
    _global("k", _input, "DGg", "self_attn.k_proj", "Gg D", layers="global_kv"),
    _global(
        "v",
        _input,
        "DGg",
        "self_attn.v_proj",
        "Gg D",
        layers="global_kv",
        when=lambda c: c.global_layers.own_values,
    ),
    _global("q_norm", _norm, "g", "self_attn.q_norm.weight", when=lambda c: c.qk_norm),
    _global(
        "k_norm",
        _norm,
        "g",
        "self_attn.k_norm.weight",
        layers="global_kv",
        when=lambda c: c.qk_norm,
    ),
    _global("o", Parameter, "HgD", "self_attn.o_proj.weight", "D Hg", adapter_inputs=2),
    _wide("gate", "DW", "mlp.gate_proj.weight", "W D"),
    _wide("up", "DW", "mlp.up_proj.weight", "W D"),
    _wide("down", "WD", "mlp.down_proj.weight", "D W"),
    _input("per_layer_gate", "DP", "per_layer_input_gate", "P D", when=_per_layer),
    Parameter(
        "per_layer_out",
        "PD",
        "per_layer_projection.weight",
        "D P",
        when=_per_layer,
        adapter_inputs=1,
    ),
    _norm("per_layer_post_norm", "d", "post_per_layer_input_norm.weight", when=_per_layer),
    Parameter(
        "layer_scalar",
        "1",
        "layer_scalar",
        "1",
        when=lambda c: c.layer_scalar,
        init=_ones,
        decays=False,
        wide=True,
    ),
    # Mixtures of which one tensor holds the gate of all experts of a layer, and behind it the up.
    _expert("experts_router", "DE", "feed_forward.router.weight", "E D", when=_LLAMA4, wide=True),
    _expert("experts_router", "DE", "router.proj.weight", "E D", when=_GEMMA4, wide=True),
    *(
        _expert(
            f"experts_{name}",
            axes,
            f"{module}{theirs}",
            hf_axes,
            when=when,
            parted=hf_axes.replace(" ", "").index("f"),
            adapter_inputs=1,
            turned_in_peft=outputs_last,
        )
        for when, module, outputs_last in (
            (_LLAMA4, "feed_forward.experts.", True),
            (_GEMMA4, "experts.", False),
        )
        for name, axes, theirs, hf_axes in (
            ("gate", "EDf", "gate_up_proj", "E D f" if outputs_last else "E f D"),
            ("up", "EDf", "gate_up_proj", "E D f" if outputs_last else "E f D"),
            ("down", "EfD", "down_proj", "E f D" if outputs_last else "E D f"),
        )
    ),
    *(
        _expert(
            f"shared_{name}",
            axes,
            f"feed_forward.shared_expert.{name}_proj.weight",
            hf_axes,
            when=_LLAMA4,
            adapter_inputs=1,
        )
        for name, axes, hf_axes in (
            ("gate", "DS", "S D"),
            ("up", "DS", "S D"),
            ("down", "SD", "D S"),
        )
    ),
    _expert(
        "router_scale", "d", "router.scale", "d", when=_GEMMA4, init=_ones, decays=False, wide=True
    ),
    _expert(
        "experts_scale",
        "E",
        "router.per_expert_scale",
        "E",
        when=_GEMMA4,
        init=_ones,
        decays=False,
        wide=True,
    ),
    *(
        _norm(name, "d", f"{theirs}.weight", when=_GEMMA4, layers="mixture")
        for name, theirs in (
            ("beside_post_norm", "post_feedforward_layernorm_1"),
            ("experts_norm", "pre_feedforward_layernorm_2"),
            ("experts_post_norm", "post_feedforward_layernorm_2"),
        )
    ),
    _input(
        "gated_q",
        "DHj",
        "self_attn.q_proj",
        "Hj D",
        when=lambda c: c.gated_attention,
        **_LOCAL,
    ),
    _linear("qkvz", "DNX", "in_proj_qkvz.weight", "NX D", **_FUSED),
    _linear("ba", "DNY", "in_proj_ba.weight", "NY D", **_FUSED),
    _linear("q", "DNn", "in_proj_qkv.weight", "Nn D", **_SEPARATE),
    _linear("k", "DNn", "in_proj_qkv.weight", "Nn D", **_SEPARATE),
    _linear("v", "DMm", "in_proj_qkv.weight", "Mm D", **_SEPARATE),
    _linear("z", "DMm", "in_proj_z.weight", "Mm D", **_SEPARATE),
    _linear("b", "DM", "in_proj_b.weight", "M D", **_SEPARATE),
    _linear("a", "DM", "in_proj_a.weight", "M D", **_SEPARATE),
    _linear("conv_q", "Nn1t", "conv1d.weight", "Nn 1 t", wide=True),
    _linear("conv_k", "Nn1t", "conv1d.weight", "Nn 1 t", wide=True),
    _linear("conv_v", "Mm1t", "conv1d.weight", "Mm 1 t", wide=True),
    _linear("log_decay", "M", "A_log", "M", init=_log_uniform, **_OF_HEAD),
    _linear("step_bias", "M", "dt_bias", "M", init=_ones, **_OF_HEAD),
    _linear("norm", "m", "norm.weight", "m", init=_ones, **_OF_HEAD),
    _linear("out", "MmD", "out_proj.weight", "D Mm", adapter_inputs=2),
)
# What stands before the name of a row that takes the place of another one, in some layers or in
# models with gates.
PREFIXES = ("global_", "wide_", "gated_")

# The place of a parameter in the tree: ("embed",) or ("layers", "q").
Path = tuple[str, ...]


def of_model(config: ModelConfig) -> dict[Path, Parameter]:
    """The parameters of a model without adapters, in the order of the table."""
    top = {(row.name,): row for row in TOP if row.when(config)}
    return top | {("layers", row.name): row for row in LAYER if row.when(config)}


def plain_name(name: str) -> str:
    """The name of a parameter without a prefix of `PREFIXES`."""
    return name.removeprefix(next(filter(name.startswith, PREFIXES), ""))


def has(config: ModelConfig, name: str) -> bool:
    """Whether the layers of a model have a parameter of this name."""
    return any(row.name == name and row.when(config) for row in LAYER)


def at(path: Path) -> Parameter:
    """The row of a place in some model's tree, adapters included.

    Raises:
      ValueError: for a place that no row names.
    """
    if path[0] != "layers":
        rows = TOP if len(path) == 1 else ()
    elif is_adapter(path[-1]):
        rows = (adapter for row in LAYER if row.adapter_inputs for adapter in row.adapter())
    else:
        rows = LAYER
    for row in rows:
        if row.name == path[-1]:
            return row
    raise ValueError(f"no row of the table of parameters is named {'/'.join(path)}")


def by_path(params) -> dict[Path, Any]:
    """A parameter tree as a flat dict."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def logical_axes(params) -> Any:
    """The tree of logical axes of a parameter tree.

    Raises:
      ValueError: naming the parameters that the table does not have.
    """
    uncovered = []

    def axes_of(path, leaf):
        path = tuple(key.key for key in path)
        try:
            axes = at(path).logical_axes
        except ValueError:
            uncovered.append(f"{'/'.join(path)} {tuple(leaf.shape)}")
            return ()
        return ("layers", *axes) if path[0] == "layers" else axes

    axes = jax.tree_util.tree_map_with_path(axes_of, params)
    if uncovered:
        raise ValueError("no logical axes for the parameters: " + ", ".join(uncovered))
    return axes


def check_params(params: Any) -> None:
    """Refuses what is no parameter tree of a policy.

    Raises:
      TypeError: saying what it is.
    """
    if not isinstance(params, Mapping) or "layers" not in params:
        raise TypeError(
            "params is the policy's parameter tree, the second of what Policy.from_pretrained "
            f"returns; given {type(params).__name__}"
        )


# --- adapters


def adaptable(config: ModelConfig | None = None) -> Mapping[str, Parameter]:
    """The weights of a layer that may have an adapter, by name; those of any model without one."""
    found: dict[str, Parameter] = {}
    for row in LAYER:
        if row.adapter_inputs and (config is None or row.when(config)):
            found.setdefault(row.name, row)
    return found


def of_module(hf_module: str) -> tuple[str, ...]:
    """The names of the weights with adapters that a Hugging Face module holds, in its order."""
    rows = [row for row in LAYER if row.adapter_inputs and row.hf_module == hf_module]
    return tuple(row.name for row in rows)


def adapted_modules() -> tuple[str, ...]:
    """The Hugging Face modules, of any model, whose weights may have an adapter."""
    return tuple(dict.fromkeys(row.hf_module for row in LAYER if row.adapter_inputs))


def adapter_names(name: str) -> tuple[str, str]:
    """The names of a weight's A and B."""
    return f"{name}_lora_a", f"{name}_lora_b"


def is_adapter(name: str) -> bool:
    """Whether a parameter of a layer is an A or a B."""
    return name.endswith(adapter_names(""))
