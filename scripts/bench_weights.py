"""Seconds from a trainer's parameters to a sampler's, by HTTP or a folder of this machine.

    python scripts/bench_weights.py                      # the shapes of SmolLM2-135M, bfloat16
    python scripts/bench_weights.py --folder /mnt/shared
    python scripts/bench_weights.py --changed 0.5        # half of the tensors' bytes
    python scripts/bench_weights.py --hidden 1024 --layers 28 --vocab 151936 --intermediate 3072

Two processes, as a run with --role has them: this one takes the digests and offers the weights (in
a folder: writes them), the other fetches what has changed, checks the digests and puts it on its
device. One JSON line: median seconds of each part over `--repeats`, bytes, and what the same rate
means for a model of 8 billion parameters.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from option_types import integer, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adpo_jax.policy import Policy
from adpo_jax.rollouts.dispatch import LEASE_S, Dispatch
from adpo_jax.rollouts.elsewhere import Reception
from adpo_jax.rollouts.weights import Versions, WeightsFolder
from adpo_jax.run.sampler_line import Line
from adpo_jax.serve.samplers import SamplersHost

KEY = "bench"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=integer(1), default=576)
    parser.add_argument("--layers", type=integer(1), default=30)
    parser.add_argument("--heads", type=integer(1), default=9)
    parser.add_argument("--kv_heads", type=integer(1), default=3)
    parser.add_argument("--intermediate", type=integer(1), default=1536)
    parser.add_argument("--vocab", type=integer(1), default=49152)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=integer(1), default=5)
    parser.add_argument("--folder", default="", help="the weights go through this folder")
    parser.add_argument(
        "--changed", type=real(least=0), default=1.0, help="share of the bytes that change"
    )
    parser.add_argument("--fetch", default="", help="used by the script itself")
    return parser.parse_args()


def make_policy(a: argparse.Namespace) -> Policy:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocab,
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return Policy.abstract_from_config(config, dtype=a.dtype)


def fetch(a: argparse.Namespace) -> None:
    """The sampler's process: prints the seconds of each fetch, on being told to."""
    line = Line(a.fetch, KEY, {}, make_policy(a).abstract_params(), folder=a.folder)
    for version in sys.stdin:
        began = time.perf_counter()
        assert line.fetch(int(version))
        _, _, arrays = line.inbox.get()
        got = time.perf_counter()
        jax.block_until_ready(jax.device_put(arrays))
        print(json.dumps([got - began, time.perf_counter() - got]), flush=True)


def changing(params: list[jax.Array], share: float) -> list[int]:
    """The places of leaves with about this share of the bytes, the largest first."""
    left, chosen = share * sum(x.nbytes for x in params), []
    for i in sorted(range(len(params)), key=lambda i: -params[i].nbytes):
        if params[i].nbytes <= left:
            chosen.append(i)
            left -= params[i].nbytes
    return chosen


def main() -> None:
    a = arguments()
    if a.fetch:
        fetch(a)
        return
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype),
        make_policy(a).abstract_params(),
    )
    params, structure = jax.tree.flatten(jax.block_until_ready(jax.device_put(params)))
    chosen = changing(params, a.changed)
    folder = WeightsFolder(a.folder, lambda: "bench") if a.folder else None
    versions = Versions(folder)
    host = SamplersHost(
        Reception(Dispatch(lease_s=LEASE_S), versions, {}, {}, {}),
        host="127.0.0.1",
        port=0,
        key=KEY,
    )
    host.start()
    command = [sys.executable, __file__, *sys.argv[1:], f"--fetch={host.address}"]
    sampler = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    rows = []
    for version in range(a.repeats + 1):
        for i in chosen:
            params[i] = jax.block_until_ready(-params[i])
        began = time.perf_counter()
        versions.add(version, jax.device_get(jax.tree.unflatten(structure, params)))
        offered = time.perf_counter() - began
        sampler.stdin.write(f"{version}\n")
        sampler.stdin.flush()
        rows.append([offered, *json.loads(sampler.stdout.readline())])
    sampler.stdin.close()
    sampler.wait(60)
    host.close()
    parts = [statistics.median(values) for values in zip(*rows[1:])]  # the first one warms up
    total = statistics.median(map(sum, rows[1:]))
    size = sum(x.nbytes for x in params)
    of_8b = 8e9 * params[0].dtype.itemsize
    result = {
        "bench": "weights",
        "by": "folder" if a.folder else "http",
        "parameters": sum(x.size for x in params),
        "bytes": size,
        "changed_bytes": sum(params[i].nbytes for i in chosen),
        **dict(zip(("offer_s", "fetch_s", "place_s"), (round(p, 3) for p in parts))),
        "total_s": round(total, 3),
        "bytes_per_s": round(size / total),
        "estimate_8b_s": round(of_8b / (size / total), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
