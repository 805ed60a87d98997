"""Small things that several tests are made from."""

import dataclasses

import jax
import numpy as np

from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.rope import Rope
from adpo_jax.policy import Policy
from adpo_jax.records import Batch, Sequences

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


def model_config(**changes) -> ModelConfig:
    """A plain two-layer decoder, as the engine's tests want it."""
    base = ModelConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        windows=(None, None),
        ropes=(Rope(),),
        layer_ropes=(0, 0),
        attention_scale=0.25,
        tie_embeddings=True,
        initializer_range=0.3,
    )
    return dataclasses.replace(base, **changes)


def policy_and_params(mesh=None, **kwargs):
    """A tiny Qwen3 with random weights."""
    return Policy.from_config(CONFIG, jax.random.key(0), mesh=mesh, **kwargs)


def batch(P=8, G=4, prompt=5, completion=6, seed=0) -> tuple[Batch, np.ndarray]:
    """A random batch with ragged prompts and completions, and rewards [P, G]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG["vocab_size"], (P, G, prompt + completion)).astype(np.int32)
    tokens[:, :, :prompt] = tokens[:, :1, :prompt]
    mask = np.ones_like(tokens)
    for p in range(P):
        mask[p, :, : rng.integers(0, prompt - 1)] = 0
        for g in range(G):
            mask[p, g, prompt + rng.integers(1, completion + 1) :] = 0
    completion_mask = mask[:, :, prompt:].astype(np.float32)
    sampler = rng.normal(-3.0, 0.1, completion_mask.shape).astype(np.float32)
    rewards = rng.normal(size=(P, G)).astype(np.float32)
    return Batch(tokens * mask, mask, completion_mask, sampler), rewards


def sequences(**kwargs) -> tuple[Sequences, np.ndarray]:
    """`batch`, ragged, and its rewards."""
    padded, rewards = batch(**kwargs)
    return padded.sequences(), rewards
