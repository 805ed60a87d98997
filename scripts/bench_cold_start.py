"""The speed of the cold start's step, in packed streams and in padded rows, in one process.

    python scripts/bench_cold_start.py
    python scripts/bench_cold_start.py --cases tail --steps 9

A case is a model and demonstrations: `arithmetic` those of configs/arithmetic.py, `tail` the same
model on 16 demonstrations a step, of which every twentieth is ten times as long as the rest. A
result is one JSON line: `tokens_per_s` by layout, tokens of prompts and completions that are run
through the model a second, the median of `--steps` steps that take turns; `places` by layout, the
places of a step over its tokens; `packed_over_rows`, the ratio of the speeds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from option_types import among, integer, listed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adpo_jax.data import arithmetic
from adpo_jax.policy import Policy
from adpo_jax.records import Sequences
from adpo_jax.update import init_state, sft


def arithmetic_like(steps: int) -> tuple[Sequences, int, dict[str, int]]:
    """The demonstrations of the embedded task, 64 of them a step."""
    encode, rows = arithmetic.make_tokenizer().encode, arithmetic.rows("demonstrations")
    prompts = [encode(f"{prompt}\n") for prompt in rows["question"][: 64 * steps]]
    completions = [[*encode(text), 0] for text in rows["completion"][: 64 * steps]]
    return (
        sft.demonstrations(prompts, completions),
        64,
        {"prompt_length": 26, "completion_length": 28},
    )


def long_tailed(steps: int) -> tuple[Sequences, int, dict[str, int]]:
    """Completions of about 24 tokens, every twentieth of about 240; 16 of them a step."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 33, 16 * steps) * np.where(np.arange(16 * steps) % 20, 1, 10)
    prompts = [rng.integers(1, 30, 24).tolist() for _ in lengths]
    completions = [rng.integers(1, 30, length).tolist() for length in lengths]
    return (
        sft.demonstrations(prompts, completions),
        16,
        {"prompt_length": 24, "completion_length": 320},
    )


CASES = {"arithmetic": arithmetic_like, "tail": long_tailed}


def measure(case: str, steps: int) -> dict:
    """The result of a case."""
    examples, batch_size, longest = CASES[case](steps + 1)
    batches = np.arange((steps + 1) * batch_size).reshape(-1, batch_size)
    policy, params = Policy.from_config(arithmetic.MODEL_CONFIG, jax.random.key(0))
    step = sft.make_sft_step(policy, optax.adamw(1e-3), batch_size=batch_size)
    layouts = {
        "packed": sft.InStreams(policy, examples, batches, **longest),
        "rows": sft.InRows(examples, **longest),
    }
    states = {
        name: init_state(policy, jax.tree.map(np.copy, params), optax.adamw(1e-3))
        for name in layouts
    }
    speeds, places = {name: [] for name in layouts}, {}
    for number, rows in enumerate(batches):
        tokens = examples.select(rows).tokens_of_groups.sum()
        for name, lay_out in layouts.items():
            started = time.perf_counter()
            batch = lay_out(rows)
            states[name], metrics = step(states[name], batch)
            jax.block_until_ready((states[name], metrics))
            if number:  # the first compiles
                speeds[name].append(tokens / (time.perf_counter() - started))
            held = batch.tokens_PGS if name == "rows" else batch.micro.tokens
            places.setdefault(name, []).append(held.size / tokens)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "case": case,
        "device": jax.devices()[0].device_kind,
        "tokens_per_s": {name: round(value) for name, value in medians.items()},
        "places": {name: round(statistics.median(found), 2) for name, found in places.items()},
        "packed_over_rows": round(medians["packed"] / medians["rows"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--cases", type=listed(among(CASES)), default=",".join(CASES), help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--steps", type=integer(1), default=15, help="steps of each layout")
    args = parser.parse_args()
    for case in args.cases:
        print(json.dumps(measure(case, args.steps)), flush=True)


if __name__ == "__main__":
    main()
