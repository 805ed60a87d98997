"""What matters of this project on one device, most important first, in under a quarter of an hour.

    python scripts/bench_device.py --out device.jsonl         on a GPU or a TPU
    python scripts/bench_device.py --tiny                     the same road on a CPU, tiny shapes
    python scripts/bench_device.py --parts rollout,update

One JSON line a part, written as soon as the part ends, so that what is cut short leaves what came
before. Nothing is fetched: weights are random, shapes those of Qwen3-0.6B and configs/gsm8k.py. A
part runs in a process of its own, whose peak of memory is its own; one that fails, is killed or is
still running when `--budget` seconds are over is a line that says so, and the next part runs.

  kernels    each kernel of this device against its plain version: the largest difference, the times
  rollout    256 requests of 100 to 1,024 tokens in and out, seed 0, ends ignored (the published
             workload of vLLM's benchmarks): tokens of completions a second
  update     optimizer steps at about 16,384 packed tokens: tokens a second, MFU
  iteration  64 prompts x 8 completions of up to 1,024 tokens, rollout to update, time of each part
  memory     the iteration's peak of bytes in use against the one that a dry run predicts
Every part names the seconds of its first call, compiling included. Where the memory is large, the
update recomputes nothing, takes two groups at once, and its layers are written out.
"""

import argparse
import functools
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from option_types import among, integer, listed, real

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone needs no installation
PARTS = ("kernels", "rollout", "update", "iteration", "memory")
# Bytes of memory from which on the update keeps all that its backward pass needs.
LARGE = 60e9
# Calls of a kernel that are queued, so that the device does not wait for the next one.
QUEUED = 20
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", type=listed(among(PARTS)), default=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="a file that gets the lines too")
    parser.add_argument(
        "--budget", type=real(above=0), default=800, help="seconds until the last start"
    )
    parser.add_argument("--repeats", type=integer(1), default=3)
    parser.add_argument("--model", default=str(ROOT / "configs" / "models" / "qwen3-0.6b"))
    parser.add_argument("--attention", default="auto", help="of the update")
    parser.add_argument("--trace", default="", help="a folder for a profile of one more update")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--child", action="store_true", help="run the parts in this process")
    return parser.parse_args(argv)


class Sizes:
    """The numbers of the parts; a sixteenth or so of them with --tiny."""

    def __init__(self, tiny: bool):
        self.requests, self.least, self.most = (8, 4, 32) if tiny else (256, 100, 1024)
        self.packed = 256 if tiny else 16384
        self.prompts, self.samples = (4, 2) if tiny else (64, 8)
        self.prompt, self.response = (16, 16) if tiny else (512, 1024)
        self.rows, self.columns = (4, 64) if tiny else (232, 1024)


class Bench:
    """The model and its parts, made once for all measurements."""

    def __init__(self, a: argparse.Namespace):
        import jax

        from adpo_jax.devices.chips import chip_of
        from adpo_jax.run import loading, setup
        from adpo_jax.run.config_checks import finalized

        self.sizes = s = Sizes(a.tiny)
        self.repeats, self.trace = a.repeats, a.trace
        config = runpy.run_path(str(ROOT / "configs" / "gsm8k.py"))["get_config"]()
        config.actor_rollout_ref.model.path = a.model
        config.actor_rollout_ref.actor.attention = a.attention
        if a.tiny:
            with config.unlocked():
                config.actor_rollout_ref.model.hf_config.update(TINY)
        config.data.max_prompt_length, config.data.max_response_length = s.prompt, s.response
        config.data.train_batch_size = s.prompts
        config.actor_rollout_ref.actor.ppo_mini_batch_size = s.prompts
        config.algorithm.num_generations = s.samples
        config.actor_rollout_ref.rollout.num_slots = s.prompts * s.samples
        if a.tiny:
            config.trainer.per_device_train_batch_size = s.samples
        self.device = jax.local_devices()[0]
        self.chip = chip_of(self.device)
        if self.chip and self.chip.memory > LARGE:
            config.trainer.gradient_checkpointing, config.trainer.scan_layers = "none", False
            config.trainer.per_device_train_batch_size = 2 * s.samples
        self.config = finalized(config)
        mesh = setup.make_mesh(self.config, [self.device])
        self.policy = loading.make_policy(self.config, loading.find_architecture(self.config), mesh)

    def params(self):
        import jax

        return self.policy.init(jax.random.key(0))

    def engine(self, prompt: int, response: int, slots: int, **options):
        from adpo_jax.engine.engine import Engine

        return Engine(
            self.policy,
            max_prompt_length=prompt,
            max_response_length=response,
            num_slots=slots,
            **options,
        )

    def learner(self, prompts: int):
        from adpo_jax.devices import sharding
        from adpo_jax.run import setup
        from adpo_jax.run.batch_plan import batch_plan

        config = self.config.copy_and_resolve_references()
        config.data.train_batch_size = prompts
        config.actor_rollout_ref.actor.ppo_mini_batch_size = prompts
        shards = sharding.BatchSharding(self.policy.mesh).num_shards
        plan = batch_plan(config, num_shards=shards)
        return setup.make_learner(config, self.policy, plan, num_steps=1000)


def timed(call, repeats: int) -> tuple[float, list[float]]:
    """Seconds of the first call, and of a call in each of some queues of calls."""
    import jax

    started = time.perf_counter()
    jax.block_until_ready(call())
    first, seconds = time.perf_counter() - started, []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(QUEUED):
            last = call()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - started) / QUEUED)
    return first, seconds


def kernels(bench: Bench) -> dict:
    """Every implementation of decoding and of packed streams against the plain one."""
    return {"decoding": _decoding(bench), "step": _step(bench), "streams": _streams(bench)}


def _runs(bench: Bench, one, model) -> bool:
    """Whether an implementation of attention runs on this device, and compiled."""
    return bench.device.platform in (one.platforms or (bench.device.platform,)) and not (
        one.obstacle(model)
    )


def _decoding(bench: Bench) -> dict:
    import jax
    import jax.numpy as jnp

    from adpo_jax.engine import kernels, kv_cache
    from adpo_jax.engine.group_attention import Reach
    from adpo_jax.engine.kv_cache import CacheLayout

    s, c = bench.sizes, bench.policy.config
    K, D, Q = c.num_kv_heads, c.head_dim, c.num_heads // c.num_kv_heads
    dtype = bench.policy.dtype
    layout = CacheLayout(1, K, D, dtype, stacked=True, transposed_keys=False)
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (1, s.rows, K, s.columns, D), dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (s.rows, K, Q, D), dtype) * jnp.asarray(D**-0.5, dtype)
    age = jax.random.randint(keys[0], (s.rows, 1), 0, s.columns)
    reach = (
        jnp.full((s.rows, Q), s.columns // 3, jnp.int32),
        jnp.broadcast_to(age, (s.rows, Q)).astype(jnp.int32),
        jnp.full((s.rows,), s.columns, jnp.int32),
    )
    kv, results, found = kv_cache.LayerKV(k, v), {}, {}
    for name, one in kernels.DECODING.table.items():
        if "interpret" in name or not _runs(bench, one, layout):
            continue
        attend = kernels.attend_part(name, layout, None)

        @jax.jit
        def part(q, kv, *reach, attend=attend):
            part = attend(q, kv, 0, Reach(*reach, ring=True))
            return part.out / part.total[..., None]

        first, times = timed(lambda part=part: part(q, kv, *reach), bench.repeats)
        results[name] = np.asarray(part(q, kv, *reach), np.float32)
        seen = int(jnp.sum(age + 1)) * 2 * K * D * jnp.dtype(dtype).itemsize
        found[name] = {
            "first_s": round(first, 3),
            "ms": round(1000 * statistics.median(times), 4),
            "gb_per_s_of_what_is_seen": round(seen / statistics.median(times) / 1e9, 1),
            "largest_difference": float(np.max(np.abs(results[name] - results["xla"]))),
        }
    return found


def _step(bench: Bench) -> dict:
    """A step of all layers, without the head, in which half of a short ring is seen."""
    import jax
    import jax.numpy as jnp

    from adpo_jax.engine import kernels
    from adpo_jax.engine.kv_cache import CacheLayout
    from adpo_jax.engine.verbs import Verbs

    policy, c = bench.policy, bench.policy.config
    layout = CacheLayout(
        c.num_layers, c.num_kv_heads, c.head_dim, policy.dtype, stacked=False, transposed_keys=False
    )
    results, found = {}, {}

    def measure(name: str) -> None:
        verbs = Verbs(policy, layout, name)
        params, state = verbs.load_params(bench.params()), _state_of(bench, verbs)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(params, state):
            hidden, ring, _ = verbs._forward(params, state)
            return hidden, state._replace(ring=ring)

        def call():
            nonlocal state
            hidden, state = step(params, state)
            results.setdefault(name, hidden)
            return hidden

        first, times = timed(call, bench.repeats)
        apart = jnp.abs(results[name] - results["xla"]).astype(jnp.float32)
        found[name] = {
            "first_s": round(first, 3),
            "ms": round(1000 * statistics.median(times), 4),
            "largest_difference": float(jnp.max(apart)),
            "largest": float(jnp.max(jnp.abs(results["xla"]))),
        }

    for name, one in kernels.DECODING.table.items():
        if "interpret" not in name and _runs(bench, one, layout):
            measure(name)
    return found


def _state_of(bench: Bench, verbs):
    """Slots behind full prompts, with random keys and values."""
    import jax
    import jax.numpy as jnp

    from adpo_jax.engine.decode_state import Sizes

    s, M = bench.sizes, bench.sizes.samples
    rows, columns = -(-s.rows // M), s.columns // 4
    slots = jnp.arange(rows * M, dtype=jnp.int32)
    generated = jnp.full_like(slots, columns // 2)
    state = verbs.init_decode_state(Sizes(len(slots), columns, rows, M, s.prompt))
    key = jax.random.key(1)
    ring, prefix = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape, x.dtype), (state.ring, state.prefix.kv)
    )
    return state._replace(
        ring=ring,
        prefix=state.prefix._replace(kv=prefix, lengths=jnp.full(rows, s.prompt, jnp.int32)),
        slots=state.slots._replace(
            token=slots,
            position=s.prompt + generated,
            generated=generated,
            active=slots >= 0,
            row=slots // M,
            rank=slots % M,
        ),
        members=slots.reshape(rows, M),
        column=jnp.int32(columns // 3),
    )


def _streams(bench: Bench) -> dict:
    import jax
    import jax.numpy as jnp

    from adpo_jax.model import attention_kernels
    from adpo_jax.model.attention import LayerInfo
    from adpo_jax.update import packing

    s, policy = bench.sizes, bench.policy
    sequences = _sequences(bench, bench.sizes.prompts, seed=1)
    packed = packing.Packing(
        sequences,
        completions_per_micro=s.samples,
        full_length=s.response,
    ).batch(sequences)
    stream = _stream_of(packed)
    N, c = stream.positions.shape[1], policy.config
    keys = jax.random.split(jax.random.key(1), 3)
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    q, k, v = (
        jax.random.normal(key, (1, N, n, c.head_dim), policy.dtype) for key, n in zip(keys, heads)
    )
    settings, found, results = policy.attention_settings, {}, {}
    info = LayerInfo(np.int32(0), np.int32(np.iinfo(np.int32).max), np.int32(0))
    real = np.asarray(stream.segments)[..., None, None] > 0
    for name, one in attention_kernels.STREAMS.table.items():
        if "interpret" in name or not _runs(bench, one, settings):
            continue

        @jax.jit
        @jax.value_and_grad
        def loss(qkv, name=name):
            attend = attention_kernels.stream_attention(name, settings, stream)
            out = attend(*qkv, info, None)[0].astype(jnp.float32)
            return jnp.sum(jnp.where(real, jnp.square(out), 0)) / out.size

        first, times = timed(lambda loss=loss: loss((q, k, v)), bench.repeats)
        _, gradient = loss((q, k, v))
        results[name] = [np.asarray(g, np.float32) for g in gradient]
        scale = max(float(np.abs(g).max()) for g in results["xla"])
        pairs = zip(results[name], results["xla"])
        found[name] = {
            "tokens": N,
            "first_s": round(first, 3),
            "ms_forward_and_backward": round(1000 * statistics.median(times), 3),
            "largest_difference_of_gradients": max(float(np.abs(a - b).max()) for a, b in pairs)
            / scale,
        }
    return found


def _stream_of(packed):
    """The `Stream` of the first micro-batch of a packed batch of one shard."""
    import jax
    import jax.numpy as jnp

    from adpo_jax.model.tile_attention import Stream

    micro = jax.tree.map(lambda x: jnp.asarray(x)[:, 0], packed.micro)
    return Stream(micro.positions, micro.segments, micro.prompts, micro.key_tiles - 1)


def _sequences(bench: Bench, prompts: int, *, seed: int, full: bool = False):
    """Random completions, of full length or of lengths like an arithmetic task's."""
    from adpo_jax.records import Completion, Sequences

    s, random = bench.sizes, np.random.default_rng(seed)
    vocab = bench.policy.config.vocab_size

    def completion():
        length = s.response if full else int(np.clip(random.geometric(3 / s.response), 1, None))
        tokens = random.integers(0, vocab, min(length, s.response))
        return Completion.sampled(tokens, np.full(len(tokens), -5.0), "length")

    texts = [random.integers(0, vocab, s.prompt // 2).tolist() for _ in range(prompts)]
    return Sequences(texts, [[completion() for _ in range(s.samples)] for _ in range(prompts)])


def rollout(bench: Bench) -> dict:
    """Requests of random lengths, which all wait at the start."""
    from adpo_jax.engine.continuous import ContinuousBatch
    from adpo_jax.engine.sampling import SamplingParams

    s, random = bench.sizes, np.random.default_rng(0)
    engine = bench.engine(s.most, s.most, s.requests, gpu_memory_utilization=0.9)
    lengths = random.integers(s.least, s.most + 1, (s.requests, 2))
    vocab = bench.policy.config.vocab_size
    prompts, params = [random.integers(0, vocab, n).tolist() for n in lengths[:, 0]], bench.params()

    def run() -> tuple[float, int]:
        batch = ContinuousBatch(engine, params)
        started, count = time.perf_counter(), 0
        for seed, (prompt, length) in enumerate(zip(prompts, lengths[:, 1])):
            batch.submit(prompt, SamplingParams(max_tokens=int(length), ignore_eos=True), seed=seed)
        while batch.busy:
            count += sum(len(new.tokens) for new in batch.step())
        seconds = time.perf_counter() - started
        batch.close()
        return seconds, count

    first, tokens = run()
    assert tokens == lengths[:, 1].sum(), (tokens, lengths[:, 1].sum())
    seconds = [run()[0] for _ in range(max(1, bench.repeats - 1))]
    return {
        "attention": engine.verbs.attention,
        "slots": engine.num_slots,
        "tokens_in": int(lengths[:, 0].sum()),
        "tokens_out": tokens,
        "first_s": round(first, 2),
        "seconds": [round(x, 3) for x in seconds],
        "tokens_per_s": round(tokens / statistics.median(seconds), 1),
    }


def update(bench: Bench) -> dict:
    """Optimizer steps on so many groups as fill the wanted number of packed tokens."""
    import jax

    s = bench.sizes
    prompts = max(1, round(s.packed / (s.prompt // 2 + s.samples * s.response)))
    learner = bench.learner(prompts)
    sequences = _sequences(bench, prompts, seed=0, full=True)
    rewards = np.random.default_rng(0).random((prompts, s.samples), np.float32)
    state, found = learner.init_state(bench.params()), []
    for _ in range(bench.repeats + 1):
        started = time.perf_counter()
        state, metrics = learner.learn(state, sequences, rewards)
        found.append((time.perf_counter() - started, metrics))
    tokens = prompts * (s.prompt // 2 + s.samples * s.response)
    seconds = [seconds for seconds, _ in found[1:]]
    last = found[-1][1]
    if bench.trace:  # for scripts/kernel_times.py
        with jax.profiler.trace(bench.trace):
            learner.learn(state, sequences, rewards)
    return {
        "packed_tokens": tokens,
        "first_s": round(found[0][0], 2),
        "seconds": [round(x, 3) for x in seconds],
        "tokens_per_s": round(tokens / statistics.median(seconds), 1),
        "mfu": _rounded(last.get("update/mfu")),
        "hfu": _rounded(last.get("update/hfu")),
        "padding_frac": _rounded(last["update/padding_frac"]),
    }


def iteration(bench: Bench) -> dict:
    """Rollout, rewards, update: a second one, after the first has compiled.

    The sizes of an update follow the lengths, so each is made twice and the second is timed.
    """
    import jax

    from adpo_jax.engine.sampling import SamplingParams
    from adpo_jax.records import Sequences
    from adpo_jax.run import setup

    s, learner = bench.sizes, bench.learner(bench.sizes.prompts)
    engine = setup.make_engine(bench.config, bench.policy, resident_bytes=learner.resident_bytes())
    vocab, random = bench.policy.config.vocab_size, np.random.default_rng(2)
    prompts = [random.integers(0, vocab, s.prompt // 2).tolist() for _ in range(s.prompts)]
    # One token in a few hundred ends a completion, as an answer to GSM8K does.
    ends = tuple(range(max(1, 3 * vocab // s.response)))
    sampling = SamplingParams(n=s.samples, max_tokens=s.response, stop_token_ids=ends)
    state, found = learner.init_state(bench.params()), []
    for seed in range(2):
        started = time.perf_counter()
        out = engine.generate(state.params, prompts, sampling, jax.random.key(seed))
        sampled = time.perf_counter()
        even = [[np.mean(c.tokens % 2 == 0) for c in group] for group in out.groups]
        sequences = Sequences(prompts, out.groups)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            state, metrics = learner.learn(state, sequences, np.asarray(even, np.float32))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
        tokens = int(out.lengths.sum())
        found.append(
            {
                "seconds": round(sampled - started + seconds[-1], 2),
                "rollout_s": round(sampled - started, 2),
                "first_update_s": round(seconds[0], 2),
                "update_s": round(seconds[-1], 2),
                "tokens": tokens,
                "rollout_tokens_per_s": round(tokens / (sampled - started), 1),
                "mfu": _rounded(metrics.get("update/mfu")),
            }
        )
    return {"slots": engine.num_slots, "first": found[0], **found[1]}


def memory(bench: Bench) -> dict:
    """The peak of this process, which the iteration made, against the dry run's."""
    from adpo_jax.dry_run import dry_run

    stats = bench.device.memory_stats() or {}
    config = bench.config.copy_and_resolve_references()
    config.data.max_prompt_length = bench.sizes.prompt // 2  # that of the iteration's prompts
    report = dry_run(config, devices=[bench.device])
    peak = stats.get("peak_bytes_in_use")
    return {
        "predicted_bytes": report.peak,
        "peaks": report.peaks,
        "peak_bytes_in_use": peak,
        "bytes_limit": stats.get("bytes_limit"),
        "prediction_over_peak": _rounded(peak and report.peak / peak),
        "compile_s": {p.name: round(p.compile_s, 1) for p in report.programs},
    }


def _rounded(value):
    return None if value is None else round(float(value), 4)


def main(argv: list[str] | None = None) -> int:
    a = arguments(argv)
    if a.tiny:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return measure(a, a.parts) if a.child else in_processes(a, a.parts)


def in_processes(a: argparse.Namespace, names: list[str]) -> int:
    """Runs each part in a process of its own; the memory is the iteration's."""
    started, failed = time.perf_counter(), False
    alone = [name for name in names if name != "memory" or "iteration" not in names]
    for name in alone:
        left = a.budget - (time.perf_counter() - started)
        if left <= 0:
            say(a, {"part": name, "skipped": f"the {a.budget:.0f} s of --budget are over"})
            continue
        with_memory = name == "iteration" and "memory" in names
        parts = "iteration,memory" if with_memory else name
        options = ["--parts", parts, "--child", "--repeats", str(a.repeats)]
        options += ["--model", a.model, "--attention", a.attention, "--trace", a.trace]
        options += ["--tiny"] * a.tiny + (["--out", str(a.out)] if a.out else [])
        try:
            done = subprocess.run([sys.executable, __file__, *options], timeout=left)
            failed |= done.returncode != 0
            if done.returncode < 0:
                say(a, {"part": name, "failed": f"killed by signal {-done.returncode}"})
        except subprocess.TimeoutExpired:
            failed = True
            say(a, {"part": name, "failed": f"still running after the last {left:.0f} s"})
    return int(failed)


def measure(a: argparse.Namespace, names: list[str]) -> int:
    """Runs parts in this process."""
    import jax

    started, failed = time.perf_counter(), False
    machine = {"jax": jax.__version__, "python": sys.version.split()[0]}
    bench, run = (
        None,
        {part.__name__: part for part in (kernels, rollout, update, iteration, memory)},
    )
    for name in names:
        try:
            bench = bench or Bench(a)
            machine["device"] = bench.device.device_kind
            line = run[name](bench)
        except Exception as error:  # whatever a device refuses, the next part runs
            failed = True
            line = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:400]}
        at = round(time.perf_counter() - started, 1)
        say(a, {"part": name, **line, **machine, "tiny": a.tiny, "at_s": at})
    return int(failed)


def say(a: argparse.Namespace, line: dict) -> None:
    print(json.dumps(line), flush=True)
    if a.out:
        with a.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of Pallas' Triton, in jax 0.12
    sys.exit(main())
