"""Seconds from a trainer's parameters to a sampler's, over HTTP on this machine.

    python scripts/bench_weights.py                      # the shapes of SmolLM2-135M, bfloat16
    python scripts/bench_weights.py --hidden 1024 --layers 28 --vocab 151936 --intermediate 3072

Two processes, as a run with --role has them: this one packs and offers the weights, the other asks
for them, checks their digest and puts them on its device. One JSON line: median seconds of each
part over `--repeats`, bytes, and what the same rate means for a model of 8 billion parameters.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adpo_jax.policy import Policy
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.dispatch import LEASE_S, Dispatch
from adpo_jax.rollouts.elsewhere import Reception
from adpo_jax.serve.samplers import SamplersHost

KEY = "bench"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv_heads", type=int, default=3)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
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
    return Policy.abstract_from_config(config, a.dtype, a.dtype)


def fetch(a: argparse.Namespace) -> None:
    """The sampler's process: prints the seconds of each fetch, on being told to."""
    import httpx

    abstract = make_policy(a).abstract_params()
    client = httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False)
    for line in sys.stdin:
        began = time.perf_counter()
        answer = client.get(f"http://{a.fetch}/sampler/weights/{int(line)}")
        got = time.perf_counter()
        assert answer.headers["etag"].strip('"') == wire.digest_of(answer.content)
        checked = time.perf_counter()
        tree = jax.device_put(wire.read_params(answer.content, abstract))
        jax.block_until_ready(tree)
        placed = time.perf_counter()
        print(json.dumps([got - began, checked - got, placed - checked]), flush=True)


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
    params = jax.block_until_ready(jax.device_put(params))
    reception = Reception(Dispatch(lease_s=LEASE_S), {}, {}, {})
    host = SamplersHost(reception, host="127.0.0.1", port=0, key=KEY)
    host.start()
    command = [sys.executable, __file__, *sys.argv[1:], f"--fetch={host.address}"]
    sampler = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    rows = []
    for version in range(a.repeats + 1):
        began = time.perf_counter()
        content = wire.packed_params(jax.device_get(params))
        reception.publish(version, content, [])
        packed = time.perf_counter() - began
        sampler.stdin.write(f"{version}\n")
        sampler.stdin.flush()
        rows.append([packed, *json.loads(sampler.stdout.readline())])
    sampler.stdin.close()
    sampler.wait(60)
    host.close()
    parts = [statistics.median(values) for values in zip(*rows[1:])]  # the first one warms up
    total = statistics.median(map(sum, rows[1:]))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    of_8b = 8e9 * jax.tree.leaves(params)[0].dtype.itemsize
    result = {
        "bench": "weights",
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "bytes": size,
        **dict(zip(("pack_s", "fetch_s", "check_s", "place_s"), (round(p, 3) for p in parts))),
        "total_s": round(total, 3),
        "bytes_per_s": round(size / total),
        "estimate_8b_s": round(of_8b / (size / total), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
