"""The tiny checkpoints of `tests/golden/`, loaded once a process."""

import functools
import json
from pathlib import Path

import numpy as np

from adpo_jax import Policy
from adpo_jax.hf import folders

GOLDEN = Path(__file__).parent / "golden"
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
FAMILIES = (
    *("qwen2", "qwen3", "llama", "llama_bias_tied", "mistral", "gemma2", "gemma3_text"),
    *MIXTURES,
)
VARIANTS = ("qwen2_sliding", "llama_linear", "llama_yarn", "llama_yarn_mscale")


def config_of(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


@functools.cache
def model(name: str):
    """(policy, params) in float32; a variant has the weights of its family."""
    config = config_of(name)
    weights = GOLDEN / config.pop("weights_of", name)
    policy = Policy.abstract_from_config(config)
    params = folders.load_params(
        policy.config, policy.abstract_params(), weights, config["model_type"]
    )
    return policy, params


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """`<batch>_tokens`, `<batch>_mask` [3, 24] and `<batch>_logits` at the real tokens, [n, 64]."""
    with np.load(GOLDEN / name / "logits.npz") as file:
        return dict(file)
