"""How long others wait for a token while a long prompt is read: at once, and in pieces.

    python scripts/bench_reading.py                       8,192 tokens, on any machine
    python scripts/bench_reading.py --prompt 100000 --sizes 512      in pieces alone

Some requests decode, and one with a long prompt arrives. Everything is run twice, and the second
run is timed. `longest_wait_s` is the longest time between two dispatches of those that decode,
`median_wait_s` the median one; `first_token_s` is when the long prompt has its first token, and
`alone_s` that time with nobody beside it. The model is a Qwen3 of 0.8 million parameters with
random weights. Each result is one JSON line.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from bench_pages import SMALL
from option_types import integer, listed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.engine.continuous import ContinuousBatch
from adpo_jax.hf.config import model_config


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=integer(1), default=8192, help="tokens of the long prompt")
    parser.add_argument(
        "--sizes",
        type=listed(integer(0)),
        default="0,256,1024",
        help="tokens of a piece; 0 for at once",
    )
    parser.add_argument(
        "--others", type=integer(0), default=7, help="requests that decode meanwhile"
    )
    return parser.parse_args(argv)


def run(batch: ContinuousBatch, a: argparse.Namespace, others: int) -> dict:
    """One long prompt beside others; the times of their dispatches until it has a token."""
    random = np.random.default_rng(0)

    def submit(length: int, seed: int):
        prompt = random.integers(0, SMALL["vocab_size"], length).tolist()
        endless = SamplingParams(max_tokens=batch.engine.max_response_length, ignore_eos=True)
        return batch.submit(prompt, endless, seed=seed)[0]

    samples = [submit(16, seed) for seed in range(others)]
    for _ in range(3 if others else 0):
        batch.step()
    long = submit(a.prompt, others)
    times = [time.perf_counter()]
    while not long.num_tokens:
        batch.step()
        times.append(time.perf_counter())
    for sample in (*samples, long):
        batch.cancel(sample)
    batch.step()
    return {"first": times[-1] - times[0], "waits": np.diff(times).tolist()}


def measure(a: argparse.Namespace, policy: Policy, params, size: int) -> dict:
    engine = Engine(
        policy,
        max_prompt_length=a.prompt,
        max_response_length=4096,
        num_slots=8,
        steps_per_dispatch=4,
        prefill_chunk_size=size,
    )
    batch = ContinuousBatch(engine, params)
    _, found = run(batch, a, a.others), run(batch, a, a.others)
    _, alone = run(batch, a, 0), run(batch, a, 0)
    return {
        "prompt": a.prompt,
        "piece": size,
        "longest_wait_s": round(max(found["waits"]), 3),
        "median_wait_s": round(statistics.median(found["waits"]), 4),
        "first_token_s": round(found["first"], 3),
        "alone_s": round(alone["first"], 3),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> int:
    a = arguments()
    config = model_config(SMALL | {"max_position_embeddings": 2 * a.prompt})
    policy = Policy(config)
    params = policy.init(jax.random.key(0))
    # The largest comes last, so that the peak of memory is that of each line.
    for size in sorted(a.sizes, key=lambda size: size or a.prompt):
        print(json.dumps(measure(a, policy, params, size)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
