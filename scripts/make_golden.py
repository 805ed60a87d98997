"""Writes `tests/golden/`: tiny random models and the logits that transformers gives for them.

    pip install torch transformers safetensors
    python scripts/make_golden.py [FOLDER ...]

Every folder is a Hugging Face checkpoint plus `logits.npz`. Variants have another config.json for
the weights of their family. The folders of `DRAWN` hold no weights: tests draw them anew from the
names of the tensors. Without arguments all folders are written. Sizes are chosen so that what tells
the families apart shows within 24 tokens: windows of a few tokens, rope scaling from an original
length of 16, norm weights and biases away from 1 and 0.

Left out: anything with pictures, and models in bf16 arithmetic.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
from golden_models import drawn, write_drawn  # noqa: E402

GOLDEN = TESTS / "golden"
TOKENS = 24
VOCAB = 64
LENGTHS = (24, 17, 9)
# Of the models of `DRAWN`.
FEW_TOKENS = 12
FEW_LENGTHS = (12, 9, 5)

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

GEMMA4 = {
    "model_type": "gemma4_text",
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 4,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 20.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.5,
            "rope_theta": 1000.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
# The norm after linear attention makes the rounding of small sums large, unless its eps is large.
QWEN_HYBRID = {
    "hidden_size": 32,
    "head_dim": 8,
    "rms_norm_eps": 0.01,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
    },
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# Settings on top of `SMALL`, by folder; "<folder>" with a "weights_of" stores no weights.
MODELS = {
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1000.0}},
    "qwen2_sliding": {
        "model_type": "qwen2",
        "weights_of": "qwen2",
        "rope_parameters": {"rope_theta": 1000.0},
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000.0},
    },
    "llama": {"model_type": "llama", "head_dim": 8, "rope_parameters": LLAMA3_ROPE},
    "llama_bias_tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama_linear": {
        "model_type": "llama",
        "weights_of": "llama",
        "head_dim": 8,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    },
    "llama_yarn": {
        "model_type": "llama",
        "weights_of": "llama",
        "head_dim": 8,
        "rope_parameters": YARN_ROPE,
    },
    "llama_yarn_mscale": {
        "model_type": "llama",
        "weights_of": "llama",
        "head_dim": 8,
        "rope_parameters": {
            **YARN_ROPE,
            "mscale": 1.2,
            "mscale_all_dim": 0.6,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 6, "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "num_hidden_layers": 7,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_theta": 1000.0},
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "rope_parameters": {"rope_theta": 1000.0},
    },
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "olmoe": {
        "model_type": "olmoe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "head_dim": 8,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 12,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    },
}

DRAWN = {
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1000.0},
    },
    "olmo2": {"model_type": "olmo2", "rope_parameters": {"rope_theta": 1000.0}},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {**YARN_ROPE, "original_max_position_embeddings": 8},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "phi3": {
        "model_type": "phi3",
        "hidden_size": 32,
        "sliding_window": 6,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.2, 3.0, 7.0],
        },
    },
    "granite": {
        "model_type": "granite",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 8,
        "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    },
    "ministral": {
        "model_type": "ministral",
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 8,
        "rope_parameters": {
            **YARN_ROPE,
            "original_max_position_embeddings": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "seed_oss": {"model_type": "seed_oss", "head_dim": 8, "attention_out_bias": True},
    "llama4_text": {
        "model_type": "llama4_text",
        "head_dim": 8,
        "intermediate_size_mlp": 20,
        "moe_layers": [],
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 4,
        "floor_scale": 3,
        "attn_scale": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    # As Scout, a mixture in every layer.
    "llama4_scout": {
        "model_type": "llama4_text",
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 4,
        "floor_scale": 3,
        "attn_scale": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    # As Maverick, a mixture in every other layer; here a token goes through two experts.
    "llama4_maverick": {
        "model_type": "llama4_text",
        "head_dim": 8,
        "intermediate_size_mlp": 20,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 4,
        "floor_scale": 3,
        "attn_scale": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    # As E2B: layers that share keys and have a wider MLP, and embeddings for each layer.
    "gemma4_text": {
        **GEMMA4,
        "num_hidden_layers": 5,
        "layer_types": [_LOCAL, _GLOBAL, _LOCAL, _LOCAL, _GLOBAL],
        "hidden_size_per_layer_input": 20,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    # As 31B: keys that are values, and fewer heads of them.
    "gemma4_large": {
        **GEMMA4,
        "num_hidden_layers": 4,
        "layer_types": [_LOCAL, _GLOBAL] * 2,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
    },
    # As 26B-A4B: experts beside the MLP.
    "gemma4_moe": {
        **GEMMA4,
        "num_hidden_layers": 4,
        "layer_types": [_LOCAL, _GLOBAL] * 2,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
    "qwen3_next": {
        **QWEN_HYBRID,
        "model_type": "qwen3_next",
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
    },
    "qwen3_5_text": {
        **QWEN_HYBRID,
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_value_head_dim": 16,
    },
    "qwen3_5_moe_text": {
        **QWEN_HYBRID,
        "model_type": "qwen3_5_moe_text",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
    },
    # Some activations reach the limit. Sizes are multiples of 32, as MXFP4 has them.
    "gpt_oss": {
        "model_type": "gpt_oss",
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "swiglu_limit": 2.0,
        "rope_parameters": {
            **YARN_ROPE,
            "original_max_position_embeddings": 8,
            "truncate": False,
        },
    },
}


def make_model(settings: dict, seed: int) -> torch.nn.Module:
    """A random model of which no weight is trivial, rounded to bf16 and run in float32."""
    config = AutoConfig.for_model(**{**SMALL, **settings})
    torch.manual_seed(seed)  # vectors of some models are random before noise is added
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight += 0.3 * noise
            else:
                fan_in = 1 if "embed" in name else weight.shape[1]
                weight.copy_(1.5 * noise / fan_in**0.5)
            weight.copy_(weight.bfloat16().float())
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.3 * torch.randn(bias.shape, generator=generator).bfloat16().float())
    return model


def drawn_model(settings: dict) -> torch.nn.Module:
    """A model of `DRAWN`, run in float32."""
    config = AutoConfig.for_model(**{**SMALL, **settings})
    if "num_experts" in settings:
        # Each expert has tensors of its own on disk, and none of its own in memory.
        with tempfile.TemporaryDirectory() as folder:
            write_drawn(config.to_dict(), Path(folder))
            model = AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager", dtype=torch.float32
            )
        return model.eval()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(drawn(name, tuple(weight.shape))))
        for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
            buffer = model.get_buffer(name)
            buffer.copy_(torch.from_numpy(drawn(name, tuple(buffer.shape))))
    return model


def batches(seed: int, tokens: int = TOKENS, lengths=LENGTHS) -> dict[str, np.ndarray]:
    """Tokens and masks of the same rows: full, padded on the right, padded on the left."""
    rng = np.random.default_rng(seed)
    full = rng.integers(3, VOCAB, (len(lengths), tokens))
    columns = np.arange(tokens)
    right = (columns < np.array(lengths)[:, None]).astype(np.int32)
    left = right[:, ::-1].copy()
    return {
        "full_tokens": full.astype(np.int32),
        "full_mask": np.ones_like(right),
        "right_tokens": (full * right).astype(np.int32),
        "right_mask": right,
        "left_tokens": (full * left).astype(np.int32),
        "left_mask": left,
    }


def logits_of(model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The logits at real tokens of each batch, [number of real tokens, V] float32.

    Positions count real tokens, as in transformers' `generate`.
    """
    logits = {}
    for batch in [name.removesuffix("_mask") for name in arrays if name.endswith("_mask")]:
        mask = arrays[f"{batch}_mask"]
        if getattr(model.config, "attn_temperature_tuning", False):
            # Llama 4 scales queries by their columns, so that padding on the left would move them.
            rows = zip(arrays[f"{batch}_tokens"], mask)
            alone = [torch.tensor(tokens[real > 0][None]).long() for tokens, real in rows]
            with torch.no_grad():
                out = [model(input_ids=row).logits[0].numpy() for row in alone]
            logits[f"{batch}_logits"] = np.concatenate(out).astype(np.float32)
            continue
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(arrays[f"{batch}_tokens"]).long(),
                attention_mask=torch.tensor(mask).long(),
                position_ids=torch.tensor(mask).long().cumsum(1).sub(1).clamp(min=0),
            ).logits
        logits[f"{batch}_logits"] = out.numpy()[mask > 0].astype(np.float32)
    return logits


def main(chosen: list[str]) -> None:
    made = {}
    for name, settings in DRAWN.items():
        if name not in (chosen or DRAWN):
            continue
        model, folder = drawn_model(settings), GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        arrays = batches(len(name), FEW_TOKENS, FEW_LENGTHS)
        arrays = {key: array for key, array in arrays.items() if not key.startswith("full")}
        np.savez_compressed(folder / "logits.npz", **arrays, **logits_of(model, arrays))
        model.config.save_pretrained(folder)
    for seed, (name, settings) in enumerate(MODELS.items()):
        if name not in (chosen or MODELS):
            continue
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        settings = dict(settings)
        weights_of = settings.pop("weights_of", None)
        model = make_model(settings, seed)
        if weights_of is not None:
            model.load_state_dict(made[weights_of].state_dict())
        made[name] = model
        folder = GOLDEN / name
        folder.mkdir(parents=True)
        arrays = batches(seed)
        if weights_of is not None:
            arrays = {key: array for key, array in arrays.items() if key.startswith("full")}
        np.savez_compressed(folder / "logits.npz", **arrays, **logits_of(model, arrays))
        if weights_of is None:
            model.bfloat16().save_pretrained(folder)
            model.float()
        else:
            config = {**model.config.to_dict(), "weights_of": weights_of}
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file():
            print(f"{path.relative_to(GOLDEN)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
