"""Tokens per second of a whole iteration, rollout to update, beside Tunix's and TRL's trainers.

    python scripts/bench_iteration.py --shapes S,M --cases fixed,ragged --peers tunix,trl

Every peer gets the same weights and prompts, float32, on the CPU: 16 prompts of 64 tokens x 8
completions of up to 128, 16 completions a micro-batch, one optimizer step; the reward is the share
of even token ids. Cases: `fixed`, every completion runs to its limit; `ragged`, V / 40 ids end one,
so that lengths are geometric with mean 40. Tokens are those of prompt and completion of every
sequence, without padding.

The peers' scripts have no ragged iteration: their figure there is the time of a ragged rollout plus
that of an update at the full length (what their padding costs), with nothing in between, counted by
the tokens of that rollout. Run and read as `bench_update.py`.
"""

import argparse
import json
import os
import sys
import time
from types import SimpleNamespace

from bench_rollout import PEER_NAMES, PEERS, REPO, SHAPES, compared, in_process, model_of, run_peer
from option_types import among, integer, listed

NEW, PROMPT, PROMPTS, GENS = 128, 64, 16, 8
CASES = ("fixed", "ragged")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=listed(among(SHAPES)), default="S,M")
    parser.add_argument("--cases", type=listed(among(CASES)), default=",".join(CASES))
    parser.add_argument(
        "--peers", type=listed(among(PEER_NAMES), least=0), default=",".join(PEER_NAMES)
    )
    parser.add_argument("--rounds", type=integer(1), default=1)
    parser.add_argument(
        "--repeats", type=integer(1), default=3, help="timed iterations of a process"
    )
    parser.add_argument("--micro", type=integer(1), default=16, help="completions a micro-batch")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_ours(a) -> dict:
    """Times our iterations in this process."""
    sys.path[:0] = [str(REPO), str(PEERS)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from adpo_jax.devices import host_memory

    host_memory.tune_malloc()
    import common
    import jax
    import numpy as np
    import optax

    from adpo_jax import Engine, SamplingParams, losses
    from adpo_jax.records import Sequences
    from adpo_jax.update import optimizer
    from adpo_jax.update.anchor import Anchor
    from adpo_jax.update.learner import Learner
    from adpo_jax.update.plan import BatchPlan

    drawn = SimpleNamespace(
        shape=a.shapes, prompts=PROMPTS, gens=GENS, prompt_len=PROMPT, new=NEW, mean_len=40.0
    )
    prompt_ids, _, _ = common.batch(drawn)
    prompts = [row.tolist() for row in prompt_ids]
    policy, params = model_of(common.SHAPES[a.shapes], common.weights(a.shapes))
    schedule = optax.constant_schedule(common.OPT["lr"])
    learner = Learner(
        policy=policy,
        algorithm=losses.Adpo(),
        optimizer=optimizer.make_optimizer(
            schedule, weight_decay=common.OPT["wd"], grad_clip=common.OPT["max_grad_norm"]
        ),
        schedule=schedule,
        anchor=Anchor(),
        plan=BatchPlan(
            PROMPTS, PROMPTS, PROMPTS, 1, micro_completions=a.micro, completion_length=NEW
        ),
    )
    state = learner.init_state(jax.tree.map(jax.numpy.array, params))
    del params
    engine = Engine(
        policy, max_prompt_length=PROMPT, max_response_length=NEW, num_slots=PROMPTS * GENS
    )
    stop_ids = tuple(common.eos_ids(drawn)) if a.cases == "ragged" else ()
    sampling = SamplingParams(n=GENS, max_tokens=NEW, stop_token_ids=stop_ids)

    def iterate(state, seed):
        out = engine.generate(state.params, prompts, sampling, jax.random.key(seed))
        even = [[np.mean(c.tokens % 2 == 0) for c in group] for group in out.groups]
        rollout_done = time.perf_counter()
        sequences = Sequences(prompts, out.groups)
        state, metrics = learner.learn(state, sequences, np.array(even, np.float32))
        jax.block_until_ready(state)
        host_memory.give_back()  # as a run does after every iteration
        return state, metrics, int(out.lengths.sum()), rollout_done

    start = time.perf_counter()
    for seed in range(a.repeats if stop_ids else 1):  # lengths, and so compiled sizes, differ
        state, *_ = iterate(state, seed)
    warm_up = time.perf_counter() - start
    common.reset_peak()
    runs, tokens, update_s, padding = common.Runs(), [], [], []
    for seed in range(a.repeats):
        runs.start()
        state, metrics, generated, rollout_done = iterate(state, seed)
        update_s.append(time.perf_counter() - rollout_done)
        runs.stop()
        tokens.append(generated + PROMPTS * GENS * PROMPT)
        padding.append(metrics["update/padding_frac"])
    return {
        "tokens_per_s": common.stat([t / w for t, w in zip(tokens, runs.wall)], 1),
        "tokens_per_cpu_s": common.stat([t / c for t, c in zip(tokens, runs.cpu)], 1),
        "other_cpus": common.stat(runs.other, 2),
        "wall_s": common.stat(runs.wall),
        "update_s": common.stat(update_s),
        "padding_frac": common.stat(padding),
        "warmup_s": round(warm_up, 2),
        "peak_rss_mb": round(common.status_mb("VmHWM")),
    }


def options_of(a, shape: str, phase: str) -> list[str]:
    options = ["--shape", shape, "--phase", phase, "--repeats", str(a.repeats)]
    return [*options, "--micro", str(a.micro)]


def run_one(a, who: str, shape: str, case: str) -> dict:
    if who == "adpo_jax":
        options = ["--here", "--shapes", shape, "--cases", case, f"--repeats={a.repeats}"]
        return in_process([sys.executable, __file__, *options, f"--micro={a.micro}"], REPO)
    if case == "fixed":
        return run_peer(who, *options_of(a, shape, "e2e"))
    rollout, update = (
        run_peer(who, *options_of(a, shape, phase)) for phase in ("rollout_eos", "update")
    )
    tokens = rollout["tokens"]["median"] + PROMPTS * GENS * PROMPT
    parts = {"peak_rss_mb": max(rollout["peak_rss_mb"], update["peak_rss_mb"])}
    parts["other_cpus"] = max(
        rollout["other_cpus"], update["other_cpus"], key=lambda x: x["median"]
    )
    for measure, seconds in (("tokens_per_s", "wall_s"), ("tokens_per_cpu_s", "cpu_s")):
        total = {k: rollout[seconds][k] + update[seconds][k] for k in ("median", "min", "max")}
        least, most = tokens / total["max"], tokens / total["min"]
        parts[measure] = {"median": tokens / total["median"], "min": least, "max": most}
    return parts


def main():
    a = arguments()
    if a.here:
        a.shapes, a.cases = a.shapes[0], a.cases[0]
        print("RESULT " + json.dumps(run_ours(a)), flush=True)
        return
    for shape in a.shapes:
        for case in a.cases:
            rates, runs = compared(
                a.rounds, a.peers, lambda who, _, s=shape, c=case: run_one(a, who, s, c)
            )
            line = {"shape": shape, "case": case} | rates
            ours = runs["adpo_jax"][-1]
            line |= {name: ours[name] for name in ("wall_s", "update_s", "padding_frac")}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
