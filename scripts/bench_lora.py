"""What LoRA saves in an update: compiled memory and time, against training all weights.

    python scripts/bench_lora.py [--rank 16] [--micro 2] [--repeats 5]

One optimizer step of ADPO on 16 prompts x 8 completions of 64 + 128 tokens, a Qwen3 of 3.3 million
parameters in float32. Prints one row a kind of training: bytes of the state that goes in and comes
out, bytes that the compiled step needs beside it, and the median time.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from option_types import integer

from adpo_jax import losses, update
from adpo_jax.model import lora
from adpo_jax.policy import Policy
from adpo_jax.records import Batch
from adpo_jax.update import optimizer

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
PROMPTS, SAMPLES, PROMPT, COMPLETION = 16, 8, 64, 128


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=integer(1), default=16)
    parser.add_argument("--micro", type=integer(1), default=2, help="prompts of a micro-batch")
    parser.add_argument("--repeats", type=integer(1), default=5)
    a = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, rank {a.rank}, {a.micro} prompts a micro-batch")
    print("| trained | parameters trained | state, MB | beside it, MB | seconds |")
    print("| --- | --- | --- | --- | --- |")
    policy, params = Policy.from_config(CONFIG, jax.random.key(0), gradient_checkpointing="full")
    adapted = policy.with_adapters(params, lora.Lora(a.rank, 2.0 * a.rank), jax.random.key(1))
    for name, model in (("adapters", adapted), ("all weights", (policy, params))):
        print(f"| {name} | {' | '.join(measure(*model, a))} |", flush=True)


def measure(policy: Policy, params, a: argparse.Namespace) -> list[str]:
    """The columns of a row."""
    adamw = optimizer.make_optimizer(
        optax.constant_schedule(1e-6), weight_decay=0.01, grad_clip=1.0
    )
    step = update.make_update(policy, losses.Adpo(), adamw, num_micro=PROMPTS // a.micro)
    state = update.init_state(policy, jax.tree.map(jnp.copy, params), adamw)
    batch, rewards = random_batch()
    arguments = (batch, losses.Adpo().score(rewards), None)
    memory = step.lower(state, *arguments).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    trained = sum(x.size for x in jax.tree.leaves(lora.split(params)[0]))
    seconds = []
    for _ in range(a.repeats + 1):  # the first compiles
        start = time.perf_counter()
        state, metrics = step(state, *arguments)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return [
        f"{trained:,}",
        f"{size / 1e6:.1f}",
        f"{memory.temp_size_in_bytes / 1e6:.1f}",
        f"{statistics.median(seconds[1:]):.2f}",
    ]


def random_batch() -> tuple[Batch, jax.Array]:
    """Random tokens without padding, and rewards [P, G]."""
    rng = np.random.default_rng(1)
    shape = (PROMPTS, SAMPLES, PROMPT + COMPLETION)
    tokens = rng.integers(2, CONFIG["vocab_size"], shape).astype(np.int32)
    mask = np.ones((PROMPTS, SAMPLES, COMPLETION), np.float32)
    batch = Batch(tokens, np.ones_like(tokens), mask, np.full_like(mask, -6.2))
    rewards = jnp.asarray(rng.normal(size=shape[:2]), jnp.float32)
    return jax.tree.map(jnp.asarray, batch), rewards


if __name__ == "__main__":
    main()
