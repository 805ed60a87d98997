"""Writes `tests/golden/`: tiny random checkpoints and the logits that transformers gives for them.

    pip install torch transformers safetensors
    python scripts/make_golden.py

Every folder is a Hugging Face checkpoint plus `logits.npz`. Variants have another config.json for
the weights of their family. Sizes are chosen so that what tells the families apart shows within 24
tokens: windows of a few tokens, rope scaling from an original length of 16, norm weights and biases
away from 1 and 0.

Left out: anything with pictures, and models in bf16 arithmetic.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
TOKENS = 24
VOCAB = 64
LENGTHS = (24, 17, 9)

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
}


def make_model(settings: dict, seed: int) -> torch.nn.Module:
    """A random model of which no weight is trivial, rounded to bf16 and run in float32."""
    config = AutoConfig.for_model(**{**SMALL, **settings})
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
    return model


def batches(seed: int) -> dict[str, np.ndarray]:
    """Tokens and masks of the same rows: full, padded on the right, padded on the left."""
    rng = np.random.default_rng(seed)
    full = rng.integers(3, VOCAB, (len(LENGTHS), TOKENS))
    columns = np.arange(TOKENS)
    right = (columns < np.array(LENGTHS)[:, None]).astype(np.int32)
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
    """The logits at real tokens of each batch, [number of real tokens, V] float32."""
    logits = {}
    for batch in [name.removesuffix("_mask") for name in arrays if name.endswith("_mask")]:
        mask = arrays[f"{batch}_mask"]
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(arrays[f"{batch}_tokens"]).long(),
                attention_mask=torch.tensor(mask).long(),
            ).logits
        logits[f"{batch}_logits"] = out.numpy()[mask > 0].astype(np.float32)
    return logits


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    made = {}
    for seed, (name, settings) in enumerate(MODELS.items()):
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
    main()
