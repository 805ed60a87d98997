"""The keys of a `config.json`: what each may hold, and those that leave the forward pass alone.

A key is read, or known to leave the forward pass alone, or refused. A setting that changes the
model and is silently ignored would train a different model.
"""

# What the keys that are read hold; a size is a positive integer of at most `LARGEST[key]`.
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
}
NUMBERS = (
    "rms_norm_eps",
    "initializer_range",
    "rope_theta",
    "rope_local_base_freq",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
    "attn_scale",
    "swiglu_alpha",
    "swiglu_limit",
    "routed_scaling_factor",
)
NUMBERS_OR_NULL = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "partial_rotary_factor",
)
COUNTS = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "max_window_layers",
    "query_pre_attn_scalar",
    "first_k_dense_replace",
)
# Counts that something is divided by.
PERIODS = (
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "floor_scale",
    "full_attention_interval",
)
SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "use_sliding_window",
    "norm_topk_prob",
    "qkv_bias",
    "attention_k_eq_v",
    "use_qk_norm",
    "use_double_wide_mlp",
    "enable_moe_block",
    "attn_output_gate",
)
# Early configs of Llama 4 say 4, which transformers takes for true.
SWITCHES_OR_NUMBERS = ("attn_temperature_tuning",)
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
    "num_local_experts": 1 << 16,
    "top_k_experts": 1 << 16,
    "moe_intermediate_size": 1 << 22,
    "shared_expert_intermediate_size": 1 << 22,
    "intermediate_size_mlp": 1 << 22,
    "attention_chunk_size": 1 << 30,
    "floor_scale": 1 << 30,
    "global_head_dim": 1 << 14,
    "num_global_key_value_heads": 1 << 14,
    "hidden_size_per_layer_input": 1 << 20,
    "vocab_size_per_layer_input": 1 << 24,
    "n_shared_experts": 1 << 10,
    "n_group": 1 << 16,
    "topk_group": 1 << 16,
    "linear_num_key_heads": 1 << 14,
    "linear_num_value_heads": 1 << 14,
    "linear_key_head_dim": 1 << 14,
    "linear_value_head_dim": 1 << 14,
}
MOST_OF_ANY = 1_000_000  # layers, heads or labels
MOST_PARAMETERS = 10**14

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
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_causal": True,
    "output_gate_type": "swish",
    "partial_rotary_factor": 1.0,
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
