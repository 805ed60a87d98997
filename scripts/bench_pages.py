"""Slots of the rollout engine at a given memory: pages against a ring for the longest completion.

    python scripts/bench_pages.py           # planned: Qwen3-8B on the four chips of a v5p host
    python scripts/bench_pages.py --run     # and run: a small model on this machine

The plan is the arithmetic of `cache_plan` alone, for a model's config and a chip of `chips.py`; no
device is needed. The host splits the model over its chips and keeps `--resident` GiB of the
trainer's state on each.

`--run` samples with a Qwen3 of 0.8 million parameters whose completions end at random, so that a
few are many times as long as the mean (`--run-limit`, `--run-mean`), with the slots that either way
fits the same memory: that of `--run-slots` slots of the ring. `tokens_a_step` is by how much one
decode step gets on, whatever the clock says; samples that waited for pages were prefilled again.

Each result is one JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from option_types import integer, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices.chips import CHIPS, GIB
from adpo_jax.engine import cache_plan
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.hf.config import model_config

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


def plan(a: argparse.Namespace, expected: int | None) -> dict:
    """The slots of one host.

    Args:
      expected: tokens of a completion that pages are planned for; None for the ring alone.
    """
    config = model_config(json.loads((ROOT / a.model / "config.json").read_text()))
    params = Policy(config, jnp.bfloat16, jnp.bfloat16).abstract_params()
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) // a.chips
    layout = CacheLayout(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        jnp.bfloat16,
        stacked=True,
        transposed_keys=False,
    )
    paging = None
    if expected is not None:
        paging = cache_plan.Paging(expected, a.limit, cache_plan.PAGE, shards=1)
    budget = int(a.utilization * CHIPS[a.chip].usable - a.resident * GIB) - weights
    found = cache_plan.plan(
        layout,
        max_prompt_length=a.prompt,
        max_response_length=a.limit,
        group_size=a.group,
        most_slots=cache_plan.MAX_SLOTS,
        multiple=1,
        splits=a.chips,
        stages=1,
        shrinks=False,
        budget=budget,
        tile=8,
        paging=paging,
    )
    columns = a.limit if paging is None else paging.ring
    slots = found.num_slots
    pages = 0 if paging is None else paging.pages(slots)
    return {
        "store": "ring" if paging is None else "pages",
        "slots": slots,
        "ring_columns": columns,
        "pages": pages,
        "tokens_written_at_most": slots * columns + pages * cache_plan.PAGE,
        "budget_a_chip": cache_plan.readable(budget),
    }


def run(a: argparse.Namespace, pages: bool) -> dict:
    """One call on this machine, after one of the same sizes that compiles."""
    policy, params = Policy.from_config(SMALL, jax.random.key(0))
    kept = a.run_slots * a.run_limit
    paging = cache_plan.Paging(a.run_mean, a.run_limit, a.page, shards=1)
    slots = a.run_slots
    if pages:
        slots = next(
            n for n in range(8 * a.run_slots, 0, -1) if n * paging.ring + paging.tokens(n) <= kept
        )
    engine = Engine(
        policy,
        max_prompt_length=32,
        max_response_length=a.run_limit,
        num_slots=slots,
        group_size=a.group,
        expected_response_length=a.run_mean if pages else None,
        page_size=a.page,
    )
    # A model without training draws each token about as often as any other.
    stops = range(max(1, SMALL["vocab_size"] // a.run_mean))
    sampling = SamplingParams(n=a.group, max_tokens=a.run_limit, stop_token_ids=tuple(stops))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, SMALL["vocab_size"], (a.run_prompts, 24)).tolist()
    for _ in range(2):
        began, cpu = time.perf_counter(), time.process_time()
        found = engine.generate(params, prompts, sampling, jax.random.key(1))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    tokens = int(found.lengths.sum())
    return {
        "store": "pages" if pages else "ring",
        "slots": slots,
        "tokens": tokens,
        "longest": int(found.lengths.max()),
        "steps": found.stats["steps"],
        "tokens_a_step": round(tokens / found.stats["steps"], 1),
        "preempted": found.stats.get("preempted", 0),
        "prefill_tokens": found.stats["prefill_tokens"],
        "tokens_a_second": round(tokens / seconds),
        "tokens_a_cpu_second": round(tokens / cpu),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="configs/models/qwen3-8b", help="a folder with a config")
    parser.add_argument("--chip", default="TPU v5p", choices=sorted(CHIPS))
    parser.add_argument("--chips", type=integer(1), default=4, help="of a host")
    parser.add_argument("--utilization", type=real(above=0), default=0.85)
    parser.add_argument("--resident", type=real(least=0), default=1.43, help="GiB of a chip")
    parser.add_argument("--limit", type=integer(1), default=30_000, help="tokens of a completion")
    parser.add_argument("--mean", type=integer(1), default=8_000, help="tokens of a completion")
    parser.add_argument(
        "--prompt", type=integer(1), default=1024, help="tokens of the longest prompt"
    )
    parser.add_argument("--group", type=integer(1), default=8, help="completions of a prompt")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--run-limit", type=integer(1), default=1024)
    parser.add_argument("--run-mean", type=integer(1), default=128)
    parser.add_argument("--run-slots", type=integer(1), default=8)
    parser.add_argument("--run-prompts", type=integer(1), default=16)
    parser.add_argument("--page", type=integer(1), default=16, help="tokens, of --run")
    a = parser.parse_args()
    for expected in (None, a.mean):
        print(json.dumps(plan(a, expected)), flush=True)
    for pages in (False, True) if a.run else ():
        print(json.dumps(run(a, pages)), flush=True)


if __name__ == "__main__":
    main()
