"""The supported model types: what tells each from Llama, and which keys of its file are read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adpo_jax.hf import gemma4, llama4, qwen_hybrid
from adpo_jax.model.model_config import ClampedGate

# The keys of a config.json on top of the defaults of its family.
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`: all that tells it from Llama.

    Attributes:
      architecture: the transformers class with this forward pass.
      defaults: every key that is read, with the value that transformers takes where config.json
        leaves it out.
      traits: the fields of `ModelConfig` that are otherwise than in Llama.
      is_second_kind: whether a layer is of the second of `kinds`, where config.json lists no
        `layer_types`.
      rotates: whether a layer has rotary embeddings.
      rope_by_kind: whether layers with a window have a rope of their own; `rope_parameters` then
        has one entry for each kind of layer.
      kinds: the layer types that it may have.
      scale_of_no_rope: the fields of `Rope` by which queries grow in layers without a rope.
      rope_keys: keys of the rope that this family reads besides those of its type.
      rope_types: other names of rope types in files of this family.
      passed_over: keys that are read nowhere though they may change training in transformers.
      quantized: the `quant_method` of weights that are read, as bfloat16.
      exported: keys that say what lies in a folder beside the model, or in what form, with their
        values in an export; None leaves a key out.
      further_layers: whether a folder may hold layers behind the last one, or some named "mtp",
        which predict further tokens and are not read.
      num_experts: of a mixture that `mixtures.py` reads itself, what transformers takes where the
        file names none; 0 for other families.
      fields: the fields of `ModelConfig` that it alone has, from the settings and the type of each
        layer; None for a family without any.
    """

    architecture: str
    defaults: Mapping[str, Any]
    traits: Callable[[Settings], Mapping[str, Any]] = lambda c: {}
    is_second_kind: Callable[[Settings, int], bool] = lambda c, layer: False
    rotates: Callable[[Settings, int], bool] = lambda c, layer: True
    rope_by_kind: bool = False
    kinds: tuple[str, str] = ("full_attention", "sliding_attention")
    scale_of_no_rope: Callable[[Settings], Mapping[str, Any]] = lambda c: {}
    rope_keys: frozenset[str] = frozenset()
    rope_types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()
    quantized: str | None = None
    exported: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    further_layers: bool = False
    num_experts: int = 0
    fields: Callable[[Settings, Sequence[str]], Mapping[str, Any]] | None = None


# --- defaults and traits that families share

COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
# The number of experts of a mixture, which transformers writes under either name.
NUM_EXPERTS = {"num_experts": None, "num_local_experts": None}
LLAMA = {
    **COMMON,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN = {
    **COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN_MOE = {
    **QWEN,
    "moe_intermediate_size": 768,
    **NUM_EXPERTS,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
# Of Qwen3-Next and Qwen3.5: a period of layers ends with one of full attention.
QWEN_HYBRID = {
    **COMMON,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
MISTRAL = {
    **COMMON,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
OLMO = {
    **COMMON,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
GEMMA = {
    **COMMON,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
GEMMA_TRAITS = {"norm_plus_one": True, "post_norms": True, "embed_scale": True}
OLMO_TRAITS = {"pre_norms": False, "post_norms": True, "qk_norm_over_heads": True}
FULL_AND_LINEAR = ("full_attention", "linear_attention")

# --- which layers are of the second kind, and which rotate


def _late_layers_slide(c: Settings, layer: int) -> bool:
    slides = c["use_sliding_window"] and c["sliding_window"] is not None
    return slides and layer >= c["max_window_layers"]


def _all_layers_slide(c: Settings, layer: int) -> bool:
    return c["sliding_window"] is not None


def _all_layers_slide_if_asked(c: Settings, layer: int) -> bool:
    return bool(c["use_sliding_window"]) and c["sliding_window"] is not None


def _all_but_every(n: int | str) -> Callable[[Settings, int], bool]:
    """Whether a layer is none of every nth; n is a number, or the key that has it."""
    return lambda c, layer: (layer + 1) % (c[n] if isinstance(n, str) else n) != 0


def _listed_or_not_every_nth_rotates(c: Settings, layer: int) -> bool:
    if c["no_rope_layers"]:
        return bool(c["no_rope_layers"][layer])
    return _all_but_every("no_rope_layer_interval")(c, layer)


# --- the families


def _without(defaults: Settings, *keys: str) -> dict[str, Any]:
    """The defaults of other families but for some that a family does not read."""
    return {key: value for key, value in defaults.items() if key not in keys}


def _qwen3_5(architecture: str, more: Mapping[str, Any], num_experts: int = 0) -> Family:
    """Qwen3.5, of which the dense models and the mixtures differ in `more` defaults."""
    return Family(
        architecture,
        {
            **QWEN_HYBRID,
            "attn_output_gate": True,
            "mamba_ssm_dtype": None,
            # Of layers that predict further tokens, which are not read.
            "mtp_num_hidden_layers": 0,
            "mtp_use_dedicated_embeddings": False,
            **more,
        },
        is_second_kind=_all_but_every("full_attention_interval"),
        kinds=FULL_AND_LINEAR,
        # Text has one position for all three sections of the rope.
        rope_keys=frozenset({"mrope_section", "mrope_interleaved"}),
        exported={"mtp_num_hidden_layers": None, "mtp_use_dedicated_embeddings": None},
        further_layers=True,
        num_experts=num_experts,
        fields=qwen_hybrid.fields,
    )


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**QWEN, "head_dim": None},
        traits=lambda c: {"qkv_bias": True},
        is_second_kind=_late_layers_slide,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN, "head_dim": 128, "attention_bias": False},
        traits=lambda c: {"qk_norm": True},
        is_second_kind=_late_layers_slide,
    ),
    "llama": Family("LlamaForCausalLM", LLAMA),
    "mistral": Family("MistralForCausalLM", MISTRAL, is_second_kind=_all_layers_slide),
    "ministral": Family(
        "MinistralForCausalLM", {**MISTRAL, "layer_types": None}, is_second_kind=_all_layers_slide
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {
            **MISTRAL,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        is_second_kind=_all_layers_slide,
        rope_keys=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        traits=lambda c: GEMMA_TRAITS,
        is_second_kind=_all_but_every(2),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            # The published configs leave these sizes to the defaults.
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        traits=lambda c: {**GEMMA_TRAITS, "qk_norm": True},
        is_second_kind=_all_but_every("sliding_window_pattern"),
        rope_by_kind=True,
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM",
        {
            **_without(GEMMA, "query_pre_attn_scalar", "attention_bias"),
            # The published configs may leave these sizes to the defaults.
            "vocab_size": 262_144,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 512,
            "final_logit_softcapping": None,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1_000_000.0,
                    "partial_rotary_factor": 0.25,
                },
            },
            "global_head_dim": 512,
            "num_global_key_value_heads": None,
            "per_layer_config": None,
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "use_bidirectional_attention": None,
            "enable_moe_block": False,
            # Of the mixture that `enable_moe_block` turns on.
            "num_experts": None,
            "top_k_experts": None,
            "moe_intermediate_size": None,
            "expert_intermediate_size": None,
        },
        is_second_kind=_all_but_every(6),
        rope_by_kind=True,
        fields=gemma4.fields,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 28,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        is_second_kind=lambda c, layer: (
            c["use_sliding_window"]
            and c["sliding_window"] is not None
            and not _listed_or_not_every_nth_rotates(c, layer)
        ),
        rotates=_listed_or_not_every_nth_rotates,
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        {
            **_without(LLAMA, "mlp_bias"),
            "vocab_size": 202_048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16_384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "use_qk_norm": True,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "layer_types": None,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "moe_layers": None,
            "interleave_moe_layer_step": 1,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
        },
        is_second_kind=lambda c, layer: (
            c["attention_chunk_size"] is not None and _listed_or_not_every_nth_rotates(c, layer)
        ),
        rotates=_listed_or_not_every_nth_rotates,
        kinds=("full_attention", "chunked_attention"),
        scale_of_no_rope=lambda c: (
            {
                "query_beta": c["attn_scale"],
                "query_length": c["floor_scale"],
                "query_offset": 1,
            }
            if c["attn_temperature_tuning"]
            else {}
        ),
        fields=llama4.fields,
    ),
    "olmo2": Family("Olmo2ForCausalLM", OLMO, traits=lambda c: OLMO_TRAITS),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {**OLMO, "rope_theta": 500_000.0, "sliding_window": 4096, "layer_types": None},
        traits=lambda c: OLMO_TRAITS,
        is_second_kind=_all_but_every(4),
        rope_by_kind=True,
    ),
    # Phi-4 is of this type too.
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
        },
        traits=lambda c: {"fused_qkv": True, "fused_gate_up": True},
        is_second_kind=_all_layers_slide,
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            **LLAMA,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        traits=lambda c: {
            "embed_multiplier": c["embedding_multiplier"],
            "residual_multiplier": c["residual_multiplier"],
            "logit_divisor": c["logits_scaling"],
            "attention_scale": c["attention_multiplier"],
        },
        passed_over=frozenset({"attention_dropout"}),
    ),
    # GLM-4 of April 2025 (0414); the type of older GLM-4 files is "chatglm" or "glm".
    "glm4": Family(
        "Glm4ForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1.5625e-7,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        traits=lambda c: {
            "out_bias": False,
            "post_norms": True,
            "norms_named_after_parts": True,
            "fused_gate_up": True,
            "rope_interleaved": True,
        },
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524_288,
            "attention_bias": True,
            "attention_out_bias": False,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
        },
        traits=lambda c: {"out_bias": bool(c["attention_out_bias"])},
        # The files ask for 0.1 of dropout in training; sampler and update must be one model.
        passed_over=frozenset({"attention_dropout", "residual_dropout"}),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **QWEN_MOE,
            "num_key_value_heads": 4,
            "head_dim": None,
            "attention_bias": False,
            "use_qk_norm": True,  # some files say so; transformers does not read it
        },
        traits=lambda c: {"qk_norm": True},
        is_second_kind=_all_layers_slide_if_asked,
        num_experts=128,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        {
            **QWEN_MOE,
            "num_key_value_heads": 16,
            "head_dim": None,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        traits=lambda c: {"qkv_bias": bool(c["qkv_bias"])},
        is_second_kind=lambda c, layer: (
            _all_layers_slide_if_asked(c, layer)
            and layer % 2 == 0
            and layer < c["max_window_layers"]
        ),
        num_experts=60,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131_072,
            "sliding_window": None,
            **NUM_EXPERTS,
            "num_experts_per_tok": 2,
        },
        is_second_kind=_all_layers_slide,
        num_experts=8,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            **COMMON,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 4096,
            "attention_bias": False,
            **NUM_EXPERTS,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        traits=lambda c: {"qk_norm_over_heads": True},
        num_experts=64,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            **COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            # The original length of YaRN again, and the number of experts of a token.
            "initial_context_length": None,
            "experts_per_token": None,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            **NUM_EXPERTS,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "quantization_config": None,
        },
        traits=lambda c: {
            "attention_sinks": True,
            "activation": ClampedGate(float(c["swiglu_alpha"]), float(c["swiglu_limit"])),
        },
        is_second_kind=lambda c, layer: layer % 2 == 0,
        quantized="mxfp4",
        exported={"quantization_config": None},
        num_experts=128,
    ),
    # GLM-4.5 and its relatives.
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {
            **COMMON,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131_072,
            "attention_bias": False,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": False,
            **NUM_EXPERTS,
            "n_routed_experts": None,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
            "num_mtp_layers": 1,
        },
        traits=lambda c: {
            "out_bias": False,
            "qk_norm": bool(c["use_qk_norm"]),
            "mlp_layers": tuple(range(c["first_k_dense_replace"])),
        },
        exported={"num_nextn_predict_layers": 0, "num_mtp_layers": None},
        further_layers=True,
        num_experts=128,
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            **QWEN_HYBRID,
            **NUM_EXPERTS,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        is_second_kind=_all_but_every("full_attention_interval"),
        kinds=FULL_AND_LINEAR,
        further_layers=True,
        num_experts=512,
        fields=qwen_hybrid.fields,
    ),
    "qwen3_5_text": _qwen3_5("Qwen3_5ForCausalLM", {"num_key_value_heads": 4}),
    "qwen3_5_moe_text": _qwen3_5(
        "Qwen3_5MoeForCausalLM",
        {
            "intermediate_size": 512,  # of an MLP, which no layer has
            **NUM_EXPERTS,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            # The weights of the experts of a token are always made to sum to 1.
            "norm_topk_prob": True,
        },
        num_experts=256,
    ),
}

# --- language models beside a vision tower


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A `model_type` whose `text_config` describes a language model beside a vision tower.

    Attributes:
      architecture: the transformers class.
      text_types: the model types that `text_config` may have; the first where it gives none.
      ties: whether embeddings are tied where the file says so nowhere outside of `text_config`;
        None for what that says.
    """

    architecture: str
    text_types: tuple[str, ...]
    ties: bool | None = None


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", ("gemma3_text",), ties=True),
    "gemma4": Wrapper("Gemma4ForConditionalGeneration", ("gemma4_text",), ties=True),
    "llama4": Wrapper("Llama4ForConditionalGeneration", ("llama4_text",), ties=False),
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", ("qwen3_5_text",), ties=False),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", ("qwen3_5_moe_text",), ties=False),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", ("mistral", "ministral3", "ministral")),
}
SUPPORTED_MODEL_TYPES = (*FAMILIES, *WRAPPERS)
