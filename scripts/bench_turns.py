"""Tokens per second of samples in turns, against prefilling the whole transcript for every turn.

    python scripts/bench_turns.py [--prompts 4] [--samples 8] [--prompt 512] [--turns 4] [--turn 64]
    python scripts/bench_turns.py --model hybrid    three of four layers have linear attention

A Qwen3 of 6 million parameters in float32, or a Qwen3.5 with 8 layers, samples some turns of 64
tokens after a prompt of 512; a tool answers each at once with 16 tokens. Only sampled tokens are
counted. Both ways say the same transcripts, in one process and by turns, `--repeats` times after
one run that compiles; the result is one JSON line with the median, least and most, by the clock and
by CPU seconds (which say more where something else was running).
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from option_types import integer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from adpo_jax import Engine, Policy, SamplingParams

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
HYBRID = CONFIG | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
MODELS = {"full": CONFIG, "hybrid": HYBRID}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="full", help="attention of the layers")
    parser.add_argument("--prompts", type=integer(1), default=4)
    parser.add_argument("--samples", type=integer(1), default=8, help="of each prompt")
    parser.add_argument("--prompt", type=integer(1), default=512, help="tokens of a prompt")
    parser.add_argument("--turns", type=integer(1), default=4)
    parser.add_argument("--turn", type=integer(1), default=64, help="tokens of a turn")
    parser.add_argument("--answer", type=integer(0), default=16, help="tokens of a tool's answer")
    parser.add_argument("--slots", type=integer(1), default=64)
    parser.add_argument("--repeats", type=integer(1), default=3)
    a = parser.parse_args()
    longest = a.turns * (a.turn + a.answer)
    policy, params = Policy.from_config(MODELS[a.model], jax.random.key(0))
    engine = Engine(
        policy,
        max_prompt_length=a.prompt,
        max_response_length=longest,
        num_slots=a.slots,
        group_size=a.samples,
        # A turn ends with the text that so many tokens make, whatever they are.
        detokenize=lambda ids: "." * len(ids),
    )
    sampling = SamplingParams(n=a.samples, max_tokens=longest, stop=("." * a.turn,))
    ways = {"kept": True, "again": False}
    transcripts = {
        way: converse(engine, params, sampling, a, keeps)[0] for way, keeps in ways.items()
    }
    runs = {way: [] for way in ways}
    for _ in range(a.repeats):
        for way, keeps in ways.items():
            runs[way].append(converse(engine, params, sampling, a, keeps)[1:])
    useful = a.prompts * a.samples * a.turns * a.turn
    line = {"model": a.model, "useful_tokens": useful, "device": jax.devices()[0].device_kind}
    line["same_tokens"] = float(np.mean(transcripts["kept"] == transcripts["again"]))
    for way, results in runs.items():
        for name, at in (("tokens_per_s", 0), ("tokens_per_cpu_s", 1)):
            rates = [useful / result[at] for result in results]
            line[f"{way}_{name}"] = [round(f(rates)) for f in (statistics.median, min, max)]
        line[f"{way}_prefill_tokens"] = results[0][2]["prefill_tokens"]
    for name in ("tokens_per_s", "tokens_per_cpu_s"):
        line[f"times_{name}"] = round(line[f"kept_{name}"][0] / line[f"again_{name}"][0], 2)
    print(json.dumps(line))


def converse(engine: Engine, params, sampling: SamplingParams, a: argparse.Namespace, keeps: bool):
    """All conversations: (sampled tokens [samples, turns * turn], seconds, CPU seconds, counts)."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, CONFIG["vocab_size"], (a.prompts, a.prompt)).tolist()
    answer = rng.integers(0, CONFIG["vocab_size"], a.answer)
    start, cpu = time.perf_counter(), time.process_time()
    with engine.session(params, sampling, jax.random.key(0), keeps_turns=keeps) as session:
        said = {s: [] for prompt in prompts for s in session.submit(prompt).samples}
        while session.busy:
            for turn in session.step():
                said[turn.sample].append(turn.tokens)
                if len(said[turn.sample]) == a.turns:
                    session.end(turn.sample)
                else:
                    session.go_on(turn.sample, answer)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        stats = dict(session.stats)
    return np.array([np.concatenate(turns) for turns in said.values()]), seconds, cpu, stats


if __name__ == "__main__":
    main()
