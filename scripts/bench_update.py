"""Tokens per second and memory of one optimizer step beside Tunix's and TRL's GRPO update.

    python scripts/bench_update.py --shapes S,M --cases equal,long,ragged --peers tunix,trl
    python scripts/bench_update.py --shapes S --cases equal --peers ""          our update alone
    python scripts/bench_update.py --shapes M --cases equal --peers mixture     experts beside dense
    python scripts/bench_update.py --head                       the chunked head against the plain

Every peer gets the same weights and tokens, float32, on the CPU: 16 prompts x 8 completions, 16
completions a micro-batch, AdamW with a clip. Cases: `equal`, prompt 64 and 128 new tokens; `long`,
prompt 512 and 64 new tokens; `ragged`, prompt 64 and up to 128 new tokens, 40 on average. Tokens
are those of prompt and completion of every sequence, without padding. The peers pad completions to
the longest, so that in `ragged` they do the work of `equal`; their time there is that of `equal`,
counted by the real tokens.

The peer `mixture` is our own update of a model whose MLPs are mixtures of 8 experts, of which each
token takes 2, with as many active parameters as the shape has.

Each runs in a process of its own, in turn, `--rounds` times; a result is one JSON line with the
median, least and most over all timed repeats, by the clock and by CPU seconds. The peers' scripts
and environments are found as `bench_rollout.py` finds them. Nothing else may be running.
"""

import argparse
import json
import os
import statistics
import sys
import time
from types import SimpleNamespace

from bench_rollout import (
    PEER_NAMES,
    PEERS,
    REPO,
    SHAPES,
    compared,
    gemm_ceiling,
    in_process,
    model_of,
    run_peer,
)
from option_types import among, integer, listed

CASES = {
    "equal": {"prompt_len": 64, "new": 128},
    "long": {"prompt_len": 512, "new": 64},
    "ragged": {"prompt_len": 64, "new": 128},
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=listed(among(SHAPES)), default="S,M")
    parser.add_argument("--cases", type=listed(among(CASES)), default=",".join(CASES))
    parser.add_argument(
        "--peers", type=listed(among(PEER_NAMES), least=0), default=",".join(PEER_NAMES)
    )
    parser.add_argument("--rounds", type=integer(1), default=1)
    parser.add_argument("--repeats", type=integer(1), default=3, help="timed repeats of a process")
    parser.add_argument("--layout", choices=("packed", "rows"), default="packed")
    parser.add_argument("--micro", type=integer(1), default=16, help="completions a micro-batch")
    parser.add_argument("--head", action="store_true", help="measure the head alone")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mixture", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_batch(common, shape: str, case: str):
    """The peers' batch as ours, and GRPO's advantages [P, G]."""
    import numpy as np

    from adpo_jax.records import Batch

    drawn = SimpleNamespace(shape=shape, prompts=16, gens=8, **CASES[case])
    prompts, completions, advantages = common.batch(drawn)
    tokens = np.concatenate([np.repeat(prompts, 8, 0), completions], 1).reshape(16, 8, -1)
    T = drawn.new
    lengths = np.full((16, 8), T)
    if case == "ragged":
        lengths = np.minimum(np.random.default_rng(2).geometric(1 / 40, (16, 8)), T)
    real = np.arange(T) < lengths[..., None]
    mask = np.concatenate([np.ones((16, 8, drawn.prompt_len), bool), real], 2)
    sampled = np.full(real.shape, -5.0, np.float32)
    batch = Batch(tokens * mask, mask.astype(np.int32), real.astype(np.float32), sampled)
    return batch, advantages.reshape(16, 8)


def mixture_of(shape: dict):
    """A policy with mixtures of experts, and parameters: as many active ones as the shape has."""
    import jax

    from adpo_jax.policy import Policy

    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inter"],
        "moe_intermediate_size": shape["inter"] // 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "head_dim": shape["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    return Policy.from_config(config, jax.random.key(0))


def run_ours(a) -> dict:
    """Times our update in this process."""
    sys.path[:0] = [str(REPO), str(PEERS)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from adpo_jax.devices.host_memory import tune_malloc

    tune_malloc()
    import common
    import jax
    import jax.numpy as jnp
    import optax

    from adpo_jax import losses, update
    from adpo_jax.update import optimizer, packing

    batch, advantages = make_batch(common, a.shapes, a.cases)
    num_tokens = int(batch.attention_mask_PGS.sum())
    shape = common.SHAPES[a.shapes]
    make = mixture_of if a.mixture else lambda shape: model_of(shape, common.weights(a.shapes))
    policy, params = make(shape)
    adamw = optimizer.make_optimizer(
        optax.constant_schedule(common.OPT["lr"]), weight_decay=common.OPT["wd"], grad_clip=1.0
    )
    algorithm = losses.Grpo()
    step = update.make_update(policy, algorithm, adamw, num_micro=128 // a.micro)
    state = update.init_state(policy, jax.tree.map(jnp.array, params), adamw)
    del params
    scores = algorithm.score(jnp.asarray(advantages))
    padding = batch.padding_frac
    if a.layout == "packed":
        sequences = batch.sequences()
        laid_out = packing.Packing(
            sequences, completions_per_micro=a.micro, full_length=batch.num_completion
        )
        batch, padding = laid_out.batch(sequences), laid_out.padding_frac
    batch = jax.tree.map(jnp.asarray, batch)

    start = time.perf_counter()
    compiled = step.lower(state, batch, scores, None).compile()
    compile_s = time.perf_counter() - start
    state, first = compiled(state, batch, scores, None)
    jax.block_until_ready(state)
    common.reset_peak()
    runs = common.Runs()
    for _ in range(a.repeats):
        runs.start()
        state, _ = compiled(state, batch, scores, None)
        jax.block_until_ready(state)
        runs.stop()
    ceiling = gemm_ceiling()
    rates = [num_tokens / wall for wall in runs.wall]
    flops = 6 * common.param_count(a.shapes)["total"] * statistics.median(rates)
    return {
        "tokens_per_s": common.stat(rates, 1),
        "tokens_per_cpu_s": common.stat([num_tokens / c for c in runs.cpu], 1),
        "other_cpus": common.stat(runs.other, 2),
        "wall_s": common.stat(runs.wall),
        "compile_s": round(compile_s, 2),
        "gemm_ceiling_gflops": round(ceiling, 1),
        "fraction_of_gemm_ceiling": round(flops / 1e9 / ceiling, 3),
        "peak_rss_mb": round(common.status_mb("VmHWM")),
        "compiled_temp_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
        "num_tokens": num_tokens,
        "padding_frac": round(padding, 4),
        "check": {"grad_norm_first": float(first["update/grad_norm"])},
        "versions": {"jax": jax.__version__},
    }


def run_one(a, who: str, shape: str, case: str) -> dict:
    if who in ("adpo_jax", "mixture"):
        options = ["--here", "--shapes", shape, "--cases", case, f"--repeats={a.repeats}"]
        options += [f"--layout={a.layout}", f"--micro={a.micro}"]
        options += ["--mixture"] if who == "mixture" else []
        return in_process([sys.executable, __file__, *options], REPO)
    options = ["--shape", shape, "--phase", "update", "--repeats", str(a.repeats)]
    options += ["--micro", str(a.micro)]
    options += ["--prompt-len", str(CASES[case]["prompt_len"]), "--new", str(CASES[case]["new"])]
    return run_peer(who, *options)


def by_real_tokens(result: dict, num_tokens: int) -> dict:
    """A peer's result counted by the tokens that are not padding."""
    share = num_tokens / result["tokens"]["median"]
    for measure in ("tokens_per_s", "tokens_per_cpu_s"):
        result[measure] = {k: v * share for k, v in result[measure].items()}
    return result


def compare(a, shape: str, case: str, peers: list[str]) -> dict:
    """One line of the table."""

    def run(who: str, ours: dict | None) -> dict:
        result = run_one(a, who, shape, case)
        of_a_peer = ours and who != "mixture"
        return by_real_tokens(result, ours["num_tokens"]) if of_a_peer else result

    rates, runs = compared(a.rounds, peers, run)
    line = {"shape": shape, "case": case, "layout": a.layout, "micro": a.micro} | rates
    if "mixture" in runs:
        mixture, dense = (rates["tokens_per_s"][who]["median"] for who in ("mixture", "adpo_jax"))
        line["mixture_over_dense"] = round(mixture / dense, 3)
    ours = runs["adpo_jax"][-1]
    names = ("gemm_ceiling_gflops", "compile_s", "compiled_temp_mb", "padding_frac", "num_tokens")
    line |= {name: ours[name] for name in names}
    for name in ("fraction_of_gemm_ceiling", "check", "versions"):
        line[name] = {who: rs[-1].get(name) for who, rs in runs.items()}
    return line


def measure_head(V: int, D: int, tokens: int, repeats: int = 3) -> dict:
    """Memory and time of loss and gradient of a tied head, the plain way and in chunks."""
    import jax
    import jax.numpy as jnp

    from adpo_jax.model.head import token_log_probs, weighted_log_probs

    config = SimpleNamespace(tie_embeddings=True, logit_soft_cap=None, vocab_size=V)

    def plain(embed, hidden, targets, weights):
        log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embed))
        return jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0])

    def chunked(embed, hidden, targets, weights):
        head = {"with_entropy": False}
        scored, _ = token_log_probs(config, {"embed": embed}, hidden, targets, **head)
        return jnp.sum(weights * scored)

    def in_one_pass(embed, hidden, targets, weights):
        rows = (hidden, targets, weights)
        return weighted_log_probs(config, {"embed": embed}, *rows, with_entropy=False)[0]

    shapes = {"embed": (V, D), "hidden": (1, tokens, D), "targets": (1, tokens)}
    abstract = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes.values()]
    abstract[2] = jax.ShapeDtypeStruct(shapes["targets"], jnp.int32)
    abstract.append(jax.ShapeDtypeStruct(shapes["targets"], jnp.float32))
    line = {"head": {"V": V, "D": D, "tokens": tokens}}
    small = min(tokens, 2048)
    keys = jax.random.split(jax.random.key(0), 4)
    real = (
        0.02 * jax.random.normal(keys[0], (V, D)),
        jax.random.normal(keys[1], (1, small, D)),
        jax.random.randint(keys[2], (1, small), 0, V),
        jax.random.normal(keys[3], (1, small)),
    )
    found = {}
    for name, function in {"plain": plain, "chunked": chunked, "in_one_pass": in_one_pass}.items():
        gradient = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
        memory = gradient.lower(*abstract).compile().memory_analysis()
        found[name] = jax.block_until_ready(gradient(*real))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(gradient(*real))
            times.append(time.perf_counter() - start)
        peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
        line[name] = {
            "temp_mb": round(memory.temp_size_in_bytes / 2**20),
            "temp_and_gradients_mb": round(peak / 2**20),
            f"s_of_{small}_tokens": round(statistics.median(times), 3),
        }
        if name != "plain":
            apart = jax.tree.map(
                lambda x, y: float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))),
                found.pop(name),
                found["plain"],
            )
            line[name]["largest_relative_difference"] = max(jax.tree.leaves(apart))
    return line


def main():
    a = arguments()
    if a.here:
        a.shapes, a.cases = a.shapes[0], a.cases[0]
        print("RESULT " + json.dumps(run_ours(a)), flush=True)
        return
    if a.head:
        sys.path.insert(0, str(REPO))
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        print(json.dumps(measure_head(151_936, 256, 16_384)), flush=True)
        return
    for shape in a.shapes:
        for case in a.cases:
            print(json.dumps(compare(a, shape, case, a.peers)), flush=True)


if __name__ == "__main__":
    main()
