"""What compilers say of the programs of a run, without a device: one JSON line a program.

    python scripts/bench_compiled.py                                   everything that compiles here
    python scripts/bench_compiled.py --platforms h100:1 --programs decode
    python scripts/bench_compiled.py --model configs/models/qwen3-8b --platforms h100:8,v5p:2x2x1

The programs are compiled by the compilers of the devices: libtpu for TPU slices (extra [tpu-aot]),
XLA's compiler for GPUs for cards (extra [gpu-aot]). Where one is missing, the line says so. Nothing
runs. Shapes are those of configs/gsm8k.py.

`decode` is a step of all slots. Its roofline is the bytes of the weights and of the keys and values
that a sample sees, each read once; every sample has `--own` tokens behind it and every prompt
`--prompt`. A kernel of ours counts what it reads of those, every other instruction what its
operands and results hold (`dry_run/hlo.py`). `update` is an optimizer step; every completion of it
has full length. Its MFU is an estimate: model FLOPs over the time in which each kernel reaches
either the peak or the bandwidth of the card, whichever is slower, and no kernel waits. `exchange`
moves the largest part of the parameters from the mesh of training to that of each host's sampling;
what lies there beside the copy is this part and the parameter it is of, cast and, where layers are
unstacked, in one piece.
"""

import argparse
import contextlib
import json
import math
import os
import runpy
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from option_types import among, integer, listed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

from adpo_jax.devices import sharding
from adpo_jax.devices.chips import chip_of
from adpo_jax.devices.flops import has_kernels, traced_flops
from adpo_jax.devices.topologies import lowered, one_host, topology_devices
from adpo_jax.dry_run.forecast import causal_pairs
from adpo_jax.dry_run.hlo import Program
from adpo_jax.dry_run.programs import traced_learning
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.records import Completion, Sequences
from adpo_jax.run import loading, setup
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.run.config_checks import finalized

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("decode", "update", "exchange")
# A copy of less than this is no copy of weights or of the cache.
LEAST_COPY = 2**19
# Bytes of memory from which on a device gets many slots.
LARGE = 60e9


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platforms", default="h100:1,v5e:2x2")
    parser.add_argument("--programs", type=listed(among(PROGRAMS)), default=",".join(PROGRAMS))
    parser.add_argument("--model", default=str(ROOT / "configs" / "models" / "qwen3-0.6b"))
    parser.add_argument("--attention", default="auto", help="of decoding")
    parser.add_argument(
        "--tensor", type=integer(0), default=0, help="of sampling; 0 for training's"
    )
    parser.add_argument("--slots", type=integer(0), default=0, help="of a device; 0 for 232 or 64")
    parser.add_argument("--ring", type=integer(1), default=1024, help="columns of a slot")
    parser.add_argument(
        "--own", type=integer(0), default=370, help="tokens that a sample has behind it"
    )
    parser.add_argument("--prompt", type=integer(1), default=256, help="tokens of a prompt")
    parser.add_argument("--prompts", type=integer(1), default=64, help="of an iteration")
    parser.add_argument("--samples", type=integer(1), default=8, help="of a prompt")
    parser.add_argument("--micro", type=integer(1), default=8, help="completions of a micro-batch")
    return parser.parse_args(argv)


class Parts:
    """What the programs of one platform are made of."""

    def __init__(self, a: argparse.Namespace, platform: str):
        config = runpy.run_path(str(ROOT / "configs" / "gsm8k.py"))["get_config"]()
        config.actor_rollout_ref.model.path = a.model
        config.data.train_batch_size = a.prompts
        config.actor_rollout_ref.actor.ppo_mini_batch_size = a.prompts
        config.algorithm.num_generations = a.samples
        config.trainer.per_device_train_batch_size = a.micro
        self.config = config = finalized(config)
        self.devices = topology_devices(platform)
        self.chip = chip_of(self.devices[0])
        self.mesh = setup.make_mesh(config, self.devices)
        source = loading.find_architecture(config)
        self.policy = loading.make_policy(config, source, self.mesh)
        host = one_host(platform, self.devices)
        tensor = math.gcd(a.tensor or self.mesh.shape["tensor"], len(host))
        self.host_mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=tensor, devices=host)
        self.slots = a.slots or (232 if self.chip.memory >= LARGE else 64)
        self.sampling = SamplingParams(n=a.samples, max_tokens=a.ring)

    def engine(self, a: argparse.Namespace) -> Engine:
        return Engine(
            self.policy,
            max_prompt_length=self.config.data.max_prompt_length,
            max_response_length=a.ring,
            num_slots=self.slots * self.host_mesh.shape["data"],
            mesh=self.host_mesh,
            group_size=a.samples,
            attention=a.attention,
        )


def compiled(traced: jax.stages.Traced, device: jax.Device) -> tuple[jax.stages.Compiled, dict]:
    """A compiled program, and what its compiler says of memory and time."""
    started = time.perf_counter()
    program = lowered(traced, device).compile()
    memory = program.memory_analysis()
    return program, {
        "compile_s": round(time.perf_counter() - started, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def seen_of(program: Program) -> dict:
    """Copies, launches and collectives of one call."""
    copies = program.copies(LEAST_COPY)
    return {
        "copies": sum(c.calls for c in copies),
        "copied_bytes": sum(c.bytes for c in copies),
        "largest_copies": [[c.shape, c.calls, c.source] for c in copies[:3]],
        "launches": program.launches,
        "collectives": sum(c.calls for c in program.collectives),
        "collective_bytes": sum(c.bytes for c in program.collectives),
    }


def decode(a: argparse.Namespace, parts: Parts) -> dict:
    """A step of decoding of one device, against the bytes that it cannot do without."""
    engine = parts.engine(a)
    made, line = compiled(engine.trace(parts.sampling)["decode"], parts.devices[0])
    # What comes before the loop of a call's steps, and after it, is shared out over them.
    program, steps = Program(made.as_text()), engine.steps_per_dispatch
    call = Program(made.as_text(), outer_turns=steps)
    layout, policy = engine.verbs.layout, engine.policy
    weights = sharding.device_bytes(engine.verbs.abstract_params())
    heads = layout.num_kv_heads // engine.policy.mesh.shape["tensor"]
    token = 2 * heads * layout.head_dim * layout.dtype.itemsize  # of a layer and a device
    rows = -(-parts.slots // a.samples)
    queries = parts.slots * policy.config.num_heads * layout.head_dim // policy.mesh.shape["tensor"]
    of_ring, of_prompts = parts.slots * a.own * token, rows * a.prompt * token
    # Queries come in two bytes and results go in four; those of `step_ring` in two, after it has
    # read what the other kernel found. It reads the token that is fed, and writes it.
    of_kernels = {
        "decode_ring": of_ring + 6 * queries,
        "decode_prompts": of_prompts + 6 * queries,
        "step_ring": of_ring + 2 * parts.slots * token + 8 * queries,
        "step_prompts": of_prompts + 6 * queries,
        "tpu_custom_call": (of_ring + of_prompts) // 2 + 6 * queries,
    }
    seen = layout.num_layers * token * (parts.slots * a.own + rows * a.prompt)
    roofline, moved = weights + seen, round(call.traffic(of_kernels) / steps)
    return line | {
        "attention": engine.verbs.attention,
        "slots": parts.slots,
        "roofline_bytes": roofline,
        "bytes": moved,
        "bytes_over_roofline": round(moved / roofline, 3),
        "kernels": program.kernel_calls,
        "roofline_tokens_per_s": round(parts.slots * parts.chip.bandwidth / roofline),
        **seen_of(program),
        "launches": round(call.launches / steps),
    }


def update(a: argparse.Namespace, parts: Parts) -> dict:
    """An optimizer step."""
    config = parts.config
    plan = batch_plan(config, num_shards=sharding.BatchSharding(parts.mesh).num_shards)
    learner = setup.make_learner(config, parts.policy, plan, num_steps=1000)
    length = config.data.max_response_length
    completion = Completion.sampled(*[[0] * length] * 2, "length")
    prompt = [0] * config.data.max_prompt_length
    sequences = Sequences([prompt] * a.prompts, [[completion] * a.samples] * a.prompts)
    traced, turns = traced_learning(learner, sequences)["update"]
    made, line = compiled(traced, parts.devices[0])
    program = Program(made.as_text(), turns)
    flops = traced_flops(traced, turns) / parts.mesh.size
    seconds = program.seconds(parts.chip.flops, parts.chip.bandwidth)
    if has_kernels(traced):
        # Of kernels, the compiled program shows the bytes alone. Five products backward for the two
        # forward, which are made twice where everything is recomputed.
        c = parts.policy.config
        pairs = a.prompts * causal_pairs(len(prompt), length, a.samples)
        inside = 4.5 * 4 * c.num_heads * c.head_dim * c.num_layers * pairs / parts.mesh.size
        seconds += inside / parts.chip.flops
        flops += inside
    # With everything recomputed the forward pass runs twice: 4 of 3 times the model's FLOPs.
    model_flops = flops * (3 / 4 if config.trainer.gradient_checkpointing == "full" else 1)
    return line | {
        "micro_batches": turns,
        "tflop": round(flops / 1e12, 2),
        "bytes": program.traffic(),
        "estimated_s": round(seconds, 4),
        "estimated_mfu": round(model_flops / parts.chip.flops / seconds, 3),
        **seen_of(program),
    }


def exchange(a: argparse.Namespace, parts: Parts) -> dict:
    """The largest part of the parameters, from where they are trained to where they sample."""
    largest, moved = parts.engine(a).verbs.loading(parts.policy)
    if moved is None:
        return {"parts": 0, "parameter_bytes": largest, "bytes_beside": largest}
    traced, count = moved
    made, line = compiled(traced, parts.devices[0])
    beside = line["temporary_bytes"] + made.memory_analysis().output_size_in_bytes
    found = {"parts": count, "parameter_bytes": largest, "bytes_beside": largest + beside}
    return line | found | seen_of(Program(made.as_text()))


def lines(a: argparse.Namespace):
    """One result a platform and program."""
    for platform in a.platforms.split(","):
        first = {"platform": platform, "model": Path(a.model).name, "jax": jax.__version__}
        try:
            parts = Parts(a, platform)
        except (ValueError, OSError) as error:
            yield first | {"skipped": str(error)}
            continue
        for name in a.programs:
            line = first | {"program": name}
            try:
                yield line | {"decode": decode, "update": update, "exchange": exchange}[name](
                    a, parts
                )
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                yield line | {"failed": str(error).splitlines()[0][:300]}


def main(argv: list[str] | None = None) -> int:
    a = arguments(argv)
    with contextlib.suppress(BrokenPipeError):
        for line in lines(a):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of Pallas' Triton, in jax 0.12
    sys.exit(main())
