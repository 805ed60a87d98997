"""How many update programs a run compiles, counted from lengths alone: nothing is compiled.

    python scripts/bench_compiles.py
    python scripts/bench_compiles.py --shards 8 --iterations 200 --mean 220,150

Prompts and completions have lengths like those of GSM8K: 64 prompts of about 70 tokens with 8
completions each, whose mean length goes evenly from the first number of `--mean` to the second
while the policy learns. A result is one JSON line: `programs`, the distinct update programs over
all iterations; `smallest`, as many if each batch got the smallest size that there is; `places`, the
places that run through the model over those of the smallest sizes.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from option_types import integer, listed, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adpo_jax.records import Completion, Sequences
from adpo_jax.update.packing import Packing, balanced
from adpo_jax.update.stream_sizes import TILE, KnownSizes


def gsm8k_like(seed: int, *, mean: float, prompts: int, group: int, limit: int) -> Sequences:
    """Sequences with lengths like those of GSM8K.

    Args:
      mean: about the mean length of a completion in tokens; `limit` cuts the longest.
    """
    rng = np.random.default_rng(seed)
    prompt_lengths = np.clip(rng.lognormal(np.log(70), 0.4, prompts), 20, 279).astype(int)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.5, (prompts, group)), 8, limit).astype(int)
    ones = np.ones(limit)
    return Sequences(
        [[1] * length for length in prompt_lengths],
        [[Completion.sampled(ones[:n], ones[:n], "stop") for n in row] for row in lengths],
    )


def count(
    shards: int,
    *,
    iterations: int = 60,
    means: tuple[float, float] = (120, 120),
    micro: int = 8,
    prompts: int = 64,
    group: int = 8,
    limit: int = 1024,
    prompt_limit: int = 512,
    tile: int = TILE,
    seed: int = 0,
) -> dict:
    """Distinct update programs of a run, and the places that sizes used again cost.

    Args:
      shards: streams side by side.
      means: mean lengths of completions in the first iteration and in the last.
      micro: completions of full length in a micro-batch.
    """
    sizes, smallest, places = KnownSizes(), set(), np.zeros(2)
    for step, mean in enumerate(np.linspace(*means, iterations)):
        sequences = gsm8k_like(seed + step, mean=mean, prompts=prompts, group=group, limit=limit)
        sequences = sequences.select(balanced(sequences.tokens_of_groups, shards))
        longest = {"full_length": limit, "prompt_length": prompt_limit}
        cut = {"completions_per_micro": micro, "num_shards": shards} | longest
        alone = Packing(sequences, tile=tile, **cut)
        used = Packing(sequences, tile=tile, sizes=sizes.of("update"), **cut)
        sizes.note("update", used.size)
        smallest.add(alone.size)
        places += used.num_places, alone.num_places
    return {
        "shards": shards,
        "iterations": iterations,
        "means": list(means),
        "micro": micro,
        "tile": tile,
        "programs": sizes.count,
        "smallest": len(smallest),
        "places": round(places[0] / places[1], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shards", type=listed(integer(1)), default="1,8", help="streams side by side"
    )
    parser.add_argument("--iterations", type=integer(1), default=60)
    parser.add_argument(
        "--mean",
        type=listed(real(above=0)),
        default="120,120",
        help="mean lengths at first and last",
    )
    parser.add_argument("--micro", type=integer(1), default=8, help="completions of a micro-batch")
    parser.add_argument("--tile", type=integer(1), default=TILE, help="tokens of an attention tile")
    parser.add_argument("--seed", type=integer(0), default=0)
    a = parser.parse_args()
    if len(a.mean) != 2:
        parser.error(f"--mean is the first and the last mean; given {len(a.mean)} numbers")
    for shards in a.shards:
        options = {"iterations": a.iterations, "micro": a.micro, "tile": a.tile, "seed": a.seed}
        print(json.dumps(count(shards, means=tuple(a.mean), **options)), flush=True)


if __name__ == "__main__":
    main()
