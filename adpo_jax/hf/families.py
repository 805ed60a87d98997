"""The supported model types, and the keys of `config.json` that each reads or may ignore.

A key is read, or known to leave the forward pass alone, or refused. A setting that changes the
model and is silently ignored would train a different model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the transformers class with this forward pass.
      defaults: every key that is read, with the value that transformers takes where config.json
        leaves it out.
    """

    architecture: str
    defaults: Mapping[str, Any]


SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
}
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
QWEN = {
    **COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
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

QWEN_MOE = {
    **QWEN,
    "moe_intermediate_size": 768,
    "num_experts": None,
    "num_local_experts": None,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", {**QWEN, "head_dim": None}),
    "qwen3": Family("Qwen3ForCausalLM", {**QWEN, "head_dim": 128, "attention_bias": False}),
    "llama": Family(
        "LlamaForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": 8,
            "head_dim": None,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
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
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**QWEN_MOE, "num_key_value_heads": 4, "head_dim": None, "attention_bias": False},
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
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 2,
        },
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
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
}
# What transformers takes for the number of experts, under either of its two names.
NUM_EXPERTS = {"qwen3_moe": 128, "qwen2_moe": 60, "mixtral": 8, "olmoe": 64}
# What the keys that are read hold; a size is a positive integer of at most `LARGEST[key]`.
NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta", "rope_local_base_freq")
NUMBERS_OR_NULL = ("attn_logit_softcapping", "final_logit_softcapping")
COUNTS = (
    "max_position_embeddings",
    "max_window_layers",
    "query_pre_attn_scalar",
    "sliding_window_pattern",
)
SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "qkv_bias",
)
OBJECTS_OR_NULL = ("rope_scaling", "rope_parameters")
# Beyond what any machine holds; a file with more is a mistake or an attack.
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "sliding_window": 1 << 30,
    "num_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 22,
    "shared_expert_intermediate_size": 1 << 22,
}
MOST_OF_ANY = 1_000_000  # layers, heads or labels
MOST_PARAMETERS = 10**14

SUPPORTED_MODEL_TYPES = (*FAMILIES, "gemma3")
GEMMA3_WITH_VISION = "Gemma3ForConditionalGeneration"

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}

# Keys with one supported value.
ONLY_VALUE = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "router_jitter_noise": 0.0,
}

# Keys of `config.json` that say nothing of the forward pass: names and versions, token ids, how
# transformers runs the model (`pretraining_tp` reorders the same sums), trains its router and
# generates.
# What transformers' base class reads is among them, and what SmolLM2's and others' first configs
# have: `is_llama_config` names the class, and `is_decoder` is so for every model here.
# `sliding_window_size` stands beside `sliding_window` in the first Gemma 2 configs.
HARMLESS = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_act",
    "id2label",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "sliding_window_size",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
}
GENERATION = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}
