"""The table of parameters: one row for each form that a parameter has on disk.

The letters of the axes are those of `parameter_row`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adpo_jax.model.model_config import Mixture, ModelConfig
from adpo_jax.model.parameter_row import Initializer, Parameter

# --- how random weights are drawn


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


# --- what rows have in common


def _norm(name: str, axes: str, hf_name: str, **settings) -> Parameter:
    return Parameter(
        name, axes, hf_name, axes, init=_identity, decays=False, keeps_dtype=True, **settings
    )


def _bias(name: str, axes: str, hf_name: str, **settings) -> Parameter:
    return Parameter(name, axes, hf_name, axes, init=_zeros, decays=False, **settings)


def _input(name: str, axes: str, module: str, hf_axes: str, **settings) -> Parameter:
    """A weight [in, *out] of a layer that reads the width of the model."""
    return Parameter(name, axes, f"{module}.weight", hf_axes, adapter_inputs=1, **settings)


def _expert(name: str, axes: str, hf_name: str, hf_axes: str, **settings) -> Parameter:
    """A row of a mixture, in the layers that have one."""
    return Parameter(name, axes, hf_name, hf_axes, layers="mixture", **settings)


def _global(
    name: str,
    make: Callable[..., Parameter],
    *row: str,
    layers: str = "global",
    when: Callable[[ModelConfig], bool] = lambda c: True,
    **settings,
) -> Parameter:
    """The row for layers without a window, of a parameter with another shape in the others."""

    def has(config: ModelConfig) -> bool:
        return config.global_layers is not None and when(config)

    return make(f"global_{name}", *row, layers=layers, when=has, **settings)


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


def _linear(
    name: str,
    axes: str,
    hf_name: str,
    hf_axes: str,
    by_key_head: bool | None = None,
    **settings,
) -> Parameter:
    """A row of linear attention.

    Args:
      by_key_head: the models that have it, by `LinearAttention.by_key_head`; None for all of them.
    """

    def has(config: ModelConfig) -> bool:
        linear = config.linear_attention
        return linear is not None and by_key_head in (None, linear.by_key_head)

    name, hf_name = f"linear_{name}", f"linear_attn.{hf_name}"
    return Parameter(name, axes, hf_name, hf_axes, when=has, layers="linear", **settings)


_LOCAL: dict[str, Any] = {"layers": "local"}
_LOCAL_KV: dict[str, Any] = {"layers": "local_kv"}
_BY_KEY_HEAD: dict[str, Any] = {"by_key_head": True, "adapter_inputs": 1}
_BY_PART: dict[str, Any] = {"by_key_head": False, "adapter_inputs": 1}
# A number for each head, with which the arithmetic is float32.
_OF_HEAD: dict[str, Any] = {"decays": False, "keeps_dtype": True}
_EXPERT_BIAS: dict[str, Any] = {"init": _zeros, "decays": False}
_ALTERNATING: dict[str, Any] = {"alternates": True, "adapter_inputs": 1}
_ALTERNATING_BIAS = _EXPERT_BIAS | {"alternates": True}

# --- which models have a row


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


def _per_layer(config: ModelConfig) -> bool:
    return config.per_layer_size > 0


def _has_mlp(config: ModelConfig) -> bool:
    return config.mixture is None or config.mixture.beside_mlp or bool(config.mlp_layers)


_MLP: dict[str, Any] = {"when": _has_mlp, "layers": "mlp"}
_FUSED_GATE_UP = _MLP | {"when": lambda c: _has_mlp(c) and c.fused_gate_up}
_SEPARATE_GATE_UP = _MLP | {
    "when": lambda c: _has_mlp(c) and not c.fused_gate_up and c.mlp_module == "mlp"
}
_PLAIN_DOWN = _MLP | {"when": lambda c: _has_mlp(c) and c.mlp_module == "mlp"}
_FEED_FORWARD = _MLP | {"when": lambda c: _has_mlp(c) and c.mlp_module == "feed_forward"}


def _mixture(has: Callable[[Mixture], Any]) -> Callable[[ModelConfig], bool]:
    """Whether a model has a mixture of which this is so."""
    return lambda config: config.mixture is not None and bool(has(config.mixture))


_EXPERTS = _mixture(lambda m: m.block == "mlp" and not m.alternating)
_ALTERNATING_EXPERTS = _mixture(lambda m: m.alternating)
_LLAMA4 = _mixture(lambda m: m.block == "feed_forward")
_GEMMA4 = _mixture(lambda m: m.beside_mlp)
_EXPERT_BIASES = _mixture(lambda m: m.biases)
_MIXTRAL = _mixture(lambda m: m.block == "block_sparse_moe")
_SHARED = _mixture(lambda m: m.shared_size and m.shared_gate)
_SHARED_PLAIN = _mixture(lambda m: m.shared_size and not m.shared_gate and m.block == "mlp")

# --- the rows

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
        keeps_dtype=True,
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
    _input("gate", "DF", "mlp.gate_proj", "F D", joined="gate_up", **_SEPARATE_GATE_UP),
    _input("up", "DF", "mlp.up_proj", "F D", joined="gate_up", **_SEPARATE_GATE_UP),
    _input("gate", "DF", "feed_forward.gate_proj", "F D", joined="gate_up", **_FEED_FORWARD),
    _input("up", "DF", "feed_forward.up_proj", "F D", joined="gate_up", **_FEED_FORWARD),
    _input("gate", "DF", "mlp.gate_up_proj", "F D", joined="gate_up", **_FUSED_GATE_UP),
    _input("up", "DF", "mlp.gate_up_proj", "F D", joined="gate_up", **_FUSED_GATE_UP),
    _bias("gate_bias", "F", "mlp.gate_proj.bias", when=lambda c: c.mlp_bias),
    _bias("up_bias", "F", "mlp.up_proj.bias", when=lambda c: c.mlp_bias),
    Parameter("down", "FD", "mlp.down_proj.weight", "D F", adapter_inputs=1, **_PLAIN_DOWN),
    Parameter(
        "down", "FD", "feed_forward.down_proj.weight", "D F", adapter_inputs=1, **_FEED_FORWARD
    ),
    _bias("down_bias", "d", "mlp.down_proj.bias", when=lambda c: c.mlp_bias),
    _norm("mlp_post_norm", "d", "post_feedforward_layernorm.weight", when=_post_norms),
    _norm("mlp_post_norm", "d", "post_mlp_layernorm.weight", when=_named_after_parts),
    _expert("experts_router", "DE", "mlp.gate.weight", "E D", when=_EXPERTS, keeps_dtype=True),
    _expert(
        "experts_router",
        "DE",
        "block_sparse_moe.gate.weight",
        "E D",
        when=_MIXTRAL,
        keeps_dtype=True,
    ),
    _expert(
        "experts_router",
        "DE",
        "mlp.router.weight",
        "E D",
        when=_ALTERNATING_EXPERTS,
        keeps_dtype=True,
    ),
    _expert(
        "experts_router_bias",
        "E",
        "mlp.router.bias",
        "E",
        when=_EXPERT_BIASES,
        decays=False,
        keeps_dtype=True,
    ),
    _expert(
        "experts_bias",
        "E",
        "mlp.gate.e_score_correction_bias",
        "E",
        when=_mixture(lambda m: m.router == "sigmoid"),
        init=_zeros,
        decays=False,
        keeps_dtype=True,
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
            ("gate", "EDf", "E D f", "gate_up_proj", _ALTERNATING_EXPERTS, _ALTERNATING),
            ("up", "EDf", "E D f", "gate_up_proj", _ALTERNATING_EXPERTS, _ALTERNATING),
            ("down", "EfD", "E f D", "down_proj", _ALTERNATING_EXPERTS, {"adapter_inputs": 1}),
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
        keeps_dtype=True,
    ),
    # Mixtures of which one tensor holds the gate of all experts of a layer, and behind it the up.
    _expert(
        "experts_router", "DE", "feed_forward.router.weight", "E D", when=_LLAMA4, keeps_dtype=True
    ),
    _expert("experts_router", "DE", "router.proj.weight", "E D", when=_GEMMA4, keeps_dtype=True),
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
        "router_scale",
        "d",
        "router.scale",
        "d",
        when=_GEMMA4,
        init=_ones,
        decays=False,
        keeps_dtype=True,
    ),
    _expert(
        "experts_scale",
        "E",
        "router.per_expert_scale",
        "E",
        when=_GEMMA4,
        init=_ones,
        decays=False,
        keeps_dtype=True,
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
    _linear("qkvz", "DNX", "in_proj_qkvz.weight", "NX D", **_BY_KEY_HEAD),
    _linear("ba", "DNY", "in_proj_ba.weight", "NY D", **_BY_KEY_HEAD),
    _linear("q", "DNn", "in_proj_qkv.weight", "Nn D", **_BY_PART),
    _linear("k", "DNn", "in_proj_qkv.weight", "Nn D", **_BY_PART),
    _linear("v", "DMm", "in_proj_qkv.weight", "Mm D", **_BY_PART),
    _linear("z", "DMm", "in_proj_z.weight", "Mm D", **_BY_PART),
    _linear("b", "DM", "in_proj_b.weight", "M D", **_BY_PART),
    _linear("a", "DM", "in_proj_a.weight", "M D", **_BY_PART),
    _linear("conv_q", "Nn1t", "conv1d.weight", "Nn 1 t", keeps_dtype=True),
    _linear("conv_k", "Nn1t", "conv1d.weight", "Nn 1 t", keeps_dtype=True),
    _linear("conv_v", "Mm1t", "conv1d.weight", "Mm 1 t", keeps_dtype=True),
    _linear("log_decay", "M", "A_log", "M", init=_log_uniform, **_OF_HEAD),
    _linear("step_bias", "M", "dt_bias", "M", init=_ones, **_OF_HEAD),
    _linear("norm", "m", "norm.weight", "m", init=_ones, **_OF_HEAD),
    _linear("out", "MmD", "out_proj.weight", "D Mm", adapter_inputs=2),
)
# What stands before the name of a row that takes the place of another one, in some layers or in
# models with gates.
PREFIXES = ("global_", "wide_", "gated_")
