"""Tokens per second and memory of an update of long completions: rows, a stream, a shared stream.

    python scripts/bench_long.py
    python scripts/bench_long.py --tokens 8192 --ways rows,stream,shared,ring --repeats 3

Four demonstrations whose completions have --tokens tokens together; a model of width 64 in float32
on the CPU; a supervised step with AdamW, which runs through the model like any update. The ways:

    rows      the plain version: padded rows, scores of all pairs of tokens, a row after the other
    stream    one packed stream on one device
    shared    the same stream, whose tokens 8 simulated devices share (mesh.sequence=8), with the
              keys and values of a layer gathered on each of them
    ring      likewise, with keys and values going round (actor.sequence_exchange=ring)

Each runs in a process of its own. A result is one JSON line: `tokens_per_s` of prompts and
completions without padding, the median of the repeats; `compiled_temp_mb`, what XLA allocates on
one device besides arguments and results; `peak_rss_mb`, the most memory of the process, all
simulated devices together; `losses` of the steps, which agree between the ways. Simulated devices
share the cores, so that theirs is no speed of eight devices.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from option_types import among, integer, listed

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
WAYS = ("rows", "stream", "shared", "ring")
PROMPT, SHARES, VOCAB = 128, 8, 512
PARTS = (0.3, 0.26, 0.24, 0.2)  # of the tokens, in each completion
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokens", type=integer(1), default=32768, help="of the completions together"
    )
    parser.add_argument("--ways", type=listed(among(WAYS)), default=",".join(WAYS))
    parser.add_argument("--repeats", type=integer(1), default=3)
    parser.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(way: str, tokens: int, repeats: int) -> dict:
    """The result of one way, in this process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    is_shared = way in ("shared", "ring")
    if is_shared:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={SHARES}"
    import jax
    import numpy as np
    import optax

    from adpo_jax.devices.host_memory import tune_malloc
    from adpo_jax.devices.sharding import BatchSharding, make_mesh
    from adpo_jax.losses.imitation import Imitation
    from adpo_jax.policy import Policy
    from adpo_jax.update import init_state, make_update, sft

    tune_malloc()
    rng = np.random.default_rng(0)
    lengths = [int(tokens * part) for part in PARTS]
    prompts = [rng.integers(1, VOCAB, PROMPT).tolist() for _ in lengths]
    completions = [rng.integers(1, VOCAB, length).tolist() for length in lengths]
    examples, every = sft.demonstrations(prompts, completions), np.arange(len(PARTS))
    mesh = make_mesh(fsdp=1, sequence=SHARES) if is_shared else None
    policy, params = Policy.from_config(CONFIG, jax.random.key(0), mesh=mesh)
    policy = dataclasses.replace(policy, sequence_exchange="ring" if way == "ring" else "gather")
    longest = {"prompt_length": PROMPT, "completion_length": max(lengths)}
    if way == "rows":
        batch = sft.InRows(examples, **longest)(every)
    else:
        batch = sft.InStreams(policy, examples, [every], **longest)(every)
    adamw, num_micro = optax.adamw(1e-3), len(every) if way == "rows" else 1
    step = make_update(policy, Imitation(), adamw, num_micro=num_micro, with_entropy=False)
    state, batch = init_state(policy, params, adamw), BatchSharding(mesh).put(batch)
    compiled = step.lower(state, batch, None, None).compile()
    seconds, found = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        state, metrics = compiled(state, batch, None, None)
        found.append(float(metrics["sft/loss"]))
        seconds.append(time.perf_counter() - started)
    return {
        "way": way,
        "tokens": int(examples.tokens_of_groups.sum()),
        "tokens_per_s": round(examples.tokens_of_groups.sum() / statistics.median(seconds), 1),
        "compiled_temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
        "losses": [round(loss, 5) for loss in found],
    }


def main() -> None:
    a = arguments()
    if a.here:
        print(json.dumps(measure(a.here, a.tokens, a.repeats)))
        return
    for way in a.ways:
        options = [f"--tokens={a.tokens}", f"--repeats={a.repeats}", f"--here={way}"]
        subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
