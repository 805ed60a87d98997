"""Tokens per second of the rollout engine beside Tunix's sampler and transformers' generate.

    python scripts/bench_rollout.py --shapes S,M --cases fixed,eos,long --peers tunix,trl
    python scripts/bench_rollout.py --shapes S --cases fixed --peers ""         the engine alone
    python scripts/bench_rollout.py --compile-time 4,12,28      seconds by the number of layers

Every peer gets the same weights and prompts, float32, on the CPU: 16 prompts x 8 samples. Cases:
`fixed`, prompt 64 and 128 new tokens; `eos`, the same with V / 40 ids that end a sequence (useful
tokens are counted); `long`, prompt 512 and 64 new tokens. Each runs in a process of its own, the
engine and the peers in turn, `--rounds` times; a result is one JSON line with the median, least and
most over all timed repeats, by the clock and by CPU seconds (which say more where something else
was running after all; `other_cpus` is how much of a CPU that took).

The peers' scripts are `scripts/peers`, and `python scripts/peers/setup.py` makes their environments
under PEERS_HOME (default ~/.cache/adpo_peers). A peer that has none is named under `missing`, with
the reason. Nothing else may be running.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from option_types import among, integer, listed

REPO = Path(__file__).resolve().parents[1]
PEERS = REPO / "scripts" / "peers"
PEERS_HOME = Path(os.environ.get("PEERS_HOME", Path.home() / ".cache" / "adpo_peers"))
SHAPES = ("XS", "S", "M", "L")  # of the peers' scripts
PEER_NAMES = ("tunix", "trl")
CASES = {
    "fixed": {"phase": "rollout", "prompt_len": 64, "new": 128},
    "eos": {"phase": "rollout_eos", "prompt_len": 64, "new": 128},
    "long": {"phase": "rollout", "prompt_len": 512, "new": 64},
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
    parser.add_argument("--slots", type=integer(1), default=128)
    parser.add_argument("--steps-per-dispatch", type=integer(1), default=32)
    parser.add_argument("--cache-dtype", default="float32")
    parser.add_argument(
        "--compile-time",
        type=listed(integer(1), least=0),
        default=[],
        help="of models of so many layers: 4,12,28",
    )
    parser.add_argument("--engine-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def policy_of(shape: dict):
    """The policy of a shape, a Qwen3."""
    from adpo_jax.model.model_config import ModelConfig
    from adpo_jax.model.rope import Rope
    from adpo_jax.policy import Policy

    L, h = shape["layers"], shape["head_dim"]
    config = ModelConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inter"],
        num_layers=L,
        num_heads=shape["heads"],
        num_kv_heads=shape["kv"],
        head_dim=h,
        windows=(None,) * L,
        ropes=(Rope(theta=1_000_000.0),),
        layer_ropes=(0,) * L,
        attention_scale=h**-0.5,
        qk_norm=True,
        tie_embeddings=True,
    )
    return Policy(config)


def model_of(shape: dict, weights: dict):
    """The policy and parameters of the peers' weights, Qwen3 by name and [out, in]."""
    import numpy as np

    L, D, h = shape["layers"], shape["hidden"], shape["head_dim"]

    def stacked(name, *axes):
        each = [weights[f"model.layers.{i}.{name}.weight"] for i in range(L)]
        return np.stack([w.T.reshape(axes) if axes else w for w in each])

    layers = {
        "attn_norm": stacked("input_layernorm"),
        "q": stacked("self_attn.q_proj", D, shape["heads"], h),
        "k": stacked("self_attn.k_proj", D, shape["kv"], h),
        "v": stacked("self_attn.v_proj", D, shape["kv"], h),
        "o": stacked("self_attn.o_proj", shape["heads"], h, D),
        "q_norm": stacked("self_attn.q_norm"),
        "k_norm": stacked("self_attn.k_norm"),
        "mlp_norm": stacked("post_attention_layernorm"),
        "gate": stacked("mlp.gate_proj", D, shape["inter"]),
        "up": stacked("mlp.up_proj", D, shape["inter"]),
        "down": stacked("mlp.down_proj", shape["inter"], D),
    }
    params = {
        "embed": weights["model.embed_tokens.weight"],
        "final_norm": weights["model.norm.weight"],
        "layers": layers,
    }
    return policy_of(shape), params


def gemm_ceiling() -> float:
    """GFLOP/s of a float32 product of 2048 x 2048 matrices, the median of 9."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048))
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(x, x).block_until_ready()
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        rates.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates)


def run_engine(a, shape_name: str, case_name: str) -> dict:
    """Times the engine in this process."""
    sys.path[:0] = [str(REPO), str(PEERS)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from adpo_jax.devices.host_memory import tune_malloc

    tune_malloc()  # as every command of ours does
    import common
    import jax
    import numpy as np

    from adpo_jax import Engine, SamplingParams

    case = CASES[case_name]
    batch = SimpleNamespace(shape=shape_name, prompts=16, gens=8, mean_len=40.0, **case)
    prompts, completions, _ = common.batch(batch)
    policy, params = model_of(common.SHAPES[shape_name], common.weights(shape_name))
    params = jax.device_put(params)
    engine = Engine(
        policy,
        max_prompt_length=case["prompt_len"],
        max_response_length=case["new"],
        num_slots=a.slots,
        steps_per_dispatch=a.steps_per_dispatch,
        cache_dtype=a.cache_dtype,
    )
    stop_ids = tuple(common.eos_ids(batch)) if case_name == "eos" else ()
    sampling = SamplingParams(n=8, max_tokens=case["new"], stop_token_ids=stop_ids)
    start = time.perf_counter()
    # Lengths differ with the key, and so do the batch sizes that have to be compiled.
    for seed in range(a.repeats if stop_ids else 1):
        engine.generate(params, prompts, sampling, jax.random.key(seed))
    warm_up = time.perf_counter() - start
    common.reset_peak()
    runs, tokens = common.Runs(), []
    for seed in range(a.repeats):
        runs.start()
        out = engine.generate(params, prompts, sampling, jax.random.key(seed))
        runs.stop()
        tokens.append(int(out.lengths.sum()))
    # The same figure as the peers print, to see that all do the same arithmetic.
    rows = np.concatenate([np.repeat(prompts, 8, 0), completions], 1)[:8]
    check = policy.log_probs(params, rows)[:, case["prompt_len"] :]
    ceiling = gemm_ceiling()
    rates = [t / w for t, w in zip(tokens, runs.wall)]
    flops = 2 * common.param_count(shape_name)["total"] * statistics.median(rates)
    return {
        "peer": "adpo_jax",
        "tokens_per_s": common.stat(rates, 1),
        "tokens_per_cpu_s": common.stat([t / c for t, c in zip(tokens, runs.cpu)], 1),
        "other_cpus": common.stat(runs.other, 2),
        "wall_s": common.stat(runs.wall),
        "warmup_s": round(warm_up, 2),
        "gemm_ceiling_gflops": round(ceiling, 1),
        "fraction_of_gemm_ceiling": round(flops / 1e9 / ceiling, 3),
        "peak_rss_mb": round(common.status_mb("VmHWM")),
        "logp_mean": float(np.mean(check)),
        "stats": out.stats,
        "versions": {"jax": jax.__version__},
    }


def compile_times(depths: list[int]) -> dict[int, float]:
    """Seconds to trace and compile prefill and decode of shape S with so many layers."""
    sys.path[:0] = [str(REPO), str(PEERS)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import common
    import jax

    from adpo_jax import Engine, SamplingParams

    jax.config.update("jax_enable_compilation_cache", False)
    seconds = {}
    for layers in [1, *depths]:  # the first one is the warm-up
        engine = Engine(
            policy_of(common.SHAPES["S"] | {"layers": layers}),
            max_prompt_length=64,
            max_response_length=128,
            num_slots=128,
        )
        start = time.perf_counter()
        for traced in engine.trace(SamplingParams(n=8)).values():
            traced.lower().compile()
        seconds[layers] = round(time.perf_counter() - start, 2)
    return {layers: seconds[layers] for layers in depths}


class Missing(Exception):
    """A peer that cannot be measured here."""


def in_process(command: list[str], cwd: Path) -> dict:
    """Runs a bench and reads its `RESULT` line.

    Raises:
      SystemExit: where there is no such line, with what the process wrote.
    """
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"no result from {' '.join(command)}\n{run.stdout}\n{run.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_peer(who: str, *options: str) -> dict:
    """Runs a peer's script in its environment.

    Raises:
      Missing: where the environment is not there, or the peer gives no result.
    """
    python = PEERS_HOME / f"venv-{who}" / "bin" / "python"
    if not (PEERS / f"bench_{who}.py").exists():
        raise Missing("no such peer; those that there are: " + ", ".join(PEER_NAMES))
    if not python.exists():
        raise Missing(f"{python} is not there; python scripts/peers/setup.py {who} makes it")
    try:
        return in_process([str(python), f"bench_{who}.py", *options], PEERS)
    except SystemExit as error:
        raise Missing(str(error)[-600:]) from error


def run_one(a, who: str, shape: str, case_name: str) -> dict:
    if who == "adpo_jax":
        options = [
            f"--slots={a.slots}",
            f"--steps-per-dispatch={a.steps_per_dispatch}",
            f"--cache-dtype={a.cache_dtype}",
        ]
        command = [sys.executable, __file__, "--engine-only", "--shapes", shape]
        command += ["--cases", case_name, f"--repeats={a.repeats}", *options]
        return in_process(command, REPO)
    case = CASES[case_name]
    options = ["--shape", shape, "--phase", case["phase"], "--repeats", str(a.repeats)]
    options += ["--prompt-len", str(case["prompt_len"]), "--new", str(case["new"])]
    return run_peer(who, *options)


def over_all(results: list[dict]) -> dict:
    """The median, least and most over several processes."""
    return {
        "median": statistics.median(r["median"] for r in results),
        "min": min(r["min"] for r in results),
        "max": max(r["max"] for r in results),
    }


def compared(rounds: int, peers: list[str], run) -> tuple[dict, dict]:
    """Runs ours and the peers in turn: the rates of all with the ratio to the better peer's.

    A peer that cannot be measured is under "missing" in the line, with the reason.

    Args:
      run: `(who, ours) -> result` of one process; `ours` is our latest result, None for ourselves.

    Returns:
      (line of rates, all results by who).
    """
    runs, missing = {who: [] for who in ["adpo_jax", *peers]}, {}
    for _ in range(rounds):
        for who in list(runs):
            try:
                runs[who].append(run(who, None if who == "adpo_jax" else runs["adpo_jax"][-1]))
            except Missing as error:
                missing[who] = str(error)
                del runs[who]
    peers = [peer for peer in peers if peer in runs]
    line = {"missing": missing} if missing else {}
    for measure in ("tokens_per_s", "tokens_per_cpu_s"):
        rate = {who: over_all([r[measure] for r in rs]) for who, rs in runs.items()}
        line[measure] = rate
        if peers:
            best = max(rate[peer]["median"] for peer in peers)
            line[f"{measure}_ratio_to_better_peer"] = round(rate["adpo_jax"]["median"] / best, 2)
    line["other_cpus"] = {
        who: max(r["other_cpus"]["median"] for r in rs) for who, rs in runs.items()
    }
    line["peak_rss_mb"] = {who: rs[-1]["peak_rss_mb"] for who, rs in runs.items()}
    return line, runs


def main():
    a = arguments()
    if a.engine_only:
        print("RESULT " + json.dumps(run_engine(a, a.shapes[0], a.cases[0])), flush=True)
        return
    if a.compile_time:
        print(json.dumps({"compile_s": compile_times(a.compile_time)}))
        return
    for shape in a.shapes:
        for case in a.cases:
            rates, runs = compared(
                a.rounds, a.peers, lambda who, _, s=shape, c=case: run_one(a, who, s, c)
            )
            line = {"shape": shape, "case": case} | rates
            ours = runs["adpo_jax"][-1]
            for name in ("gemm_ceiling_gflops", "fraction_of_gemm_ceiling", "warmup_s", "stats"):
                line[name] = ours[name]
            line["versions"] = {who: r[-1]["versions"] for who, r in runs.items()}
            line["logp_mean"] = {
                who: r[-1].get("check", r[-1]).get("logp_mean") for who, r in runs.items()
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
