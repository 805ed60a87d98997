"""What a run would need, found by compiling it: no iteration is run, no weights are read.

    python -m adpo_jax.main --config=configs/gsm8k.py --dry_run
    python -m adpo_jax.main --config=configs/gsm8k.py --dry_run_topology=v5e:2x4
    python -m adpo_jax.main --config=configs/gsm8k.py --dry_run_topology=h100:8

The programs of an iteration (prefill, decode, anchor, update, and reference or teacher where they
come from folders) are traced with every prompt and completion at full length: the lengths decide
how the update packs them, and shapes stand in for arrays of the model, the cache and packed
batches. They are compiled for the devices at hand, or through libtpu for a TPU slice that is not
there. The memory is what XLA says it will allocate. FLOPs and collectives are read from the
compiled programs, loops counted (`hlo`).

The floor of an iteration is arithmetic at the chip's peak or memory traffic at its full bandwidth,
whichever is longer, and no run beats it. Beside it stands a forecast (`forecast`).

Letters: P prompts, G completions of a prompt, T tokens.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from adpo_jax.devices import sharding
from adpo_jax.devices.chips import Chip, chip_of
from adpo_jax.devices.flops import (
    GROUPED_PRODUCTS,
    OF_ROWS_LEFT,
    has_exchange,
    has_kernels,
    traced_flops,
)
from adpo_jax.devices.topologies import lowered, one_host, topology_devices
from adpo_jax.dry_run import forecast
from adpo_jax.dry_run.forecast import Least, Lengths
from adpo_jax.dry_run.hlo import Program
from adpo_jax.dry_run.report import COPY, LOADING, PROGRAM_OF, ProgramCost, Report
from adpo_jax.engine.cache_plan import readable
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.model.exchange import ROOM
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Completion, Sequences
from adpo_jax.run import loading, setup
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.run.config_checks import finalized
from adpo_jax.update.learner import Learner


def dry_run(
    config: ConfigDict, topology: str = "", *, devices: list | None = None, lengths: str = ""
) -> Report:
    """Compiles an iteration of a run.

    Args:
      topology: a TPU slice as libtpu names it, such as "v5e:2x4", or GPUs, such as "h100:8"; "" for
        the devices at hand.
      devices: those at hand to compile for; None for all.
      lengths: of completions, for the forecast, as `forecast.read_lengths` takes them.

    Raises:
      ValueError: for a config that cannot work on these devices, or a topology that cannot be
        compiled for here.
    """
    config = finalized(config)
    samples = config.data.train_batch_size * config.algorithm.num_generations
    expected = forecast.read_lengths(lengths, config.data.max_response_length, samples)
    if not topology:
        devices = devices or jax.devices()
        where = f"{len(devices)} x {devices[0].device_kind}"
        return _report(config, devices, None, where, expected)
    devices = topology_devices(topology)
    return _report(config, devices, one_host(topology, devices), topology, expected)


def _report(
    config: ConfigDict, devices: list, host: list | None, where: str, lengths: Lengths
) -> Report:
    mesh = setup.make_mesh(config, devices)
    plan = batch_plan(config, num_shards=sharding.BatchSharding(mesh).num_shards)
    source = loading.find_architecture(config)
    policy = loading.make_policy(config, source, mesh)
    host_mesh = host and _host_mesh(config, mesh, host)
    fixed = {name: found.policy for name, found in loading.find_fixed(config, source, mesh).items()}
    # So many steps are more than the learning rate takes to warm up.
    learner = setup.make_learner(config, policy, plan, num_steps=10**6, fixed=fixed)
    engine = setup.make_engine(config, policy, host_mesh, resident_bytes=learner.resident_bytes())
    sampling = setup.make_sampling(config, source)

    hosts, chip = _num_processes(mesh), chip_of(devices[0])
    calls = _calls(config, engine, learner, num_processes=hosts)
    least = _least(config, engine, mesh, fixed)
    drawn = lengths.draw(_own_prompts(config, hosts) * config.algorithm.num_generations)
    expected = forecast.decode_steps(drawn, engine.num_slots)
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    G = config.algorithm.num_generations
    share = (prompt + G * drawn.mean()) / (prompt + G * response)
    programs, failed = [], {}
    for name, (traced, turns) in _traced(config, engine, learner, sampling).items():
        try:
            on = engine.policy.mesh if name in ("prefill", "decode") else mesh
            on = list(on.devices.flat)
            slices = sharding.slice_numbers(on, of_processes=config.mesh.dcn_data > 1)
            steps_of_call = engine.steps_per_dispatch if name == "decode" else 1
            program = _compiled(
                name, traced, on, turns, calls[name], least[name], chip, slices, steps_of_call
            )
            if name == "decode":
                program = dataclasses.replace(program, expected_calls=expected)
            elif name != "prefill":
                program = dataclasses.replace(program, expected_share=share)
            programs.append(program)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failed[name] = _hbm_text(str(error))
    copy = engine.verbs.copied_bytes(policy)
    rollout = {COPY: copy, "cache": engine.plan.device_bytes}
    if engine.reading_bytes:
        rollout["a prompt that is read"] = engine.reading_bytes
    report = Report(
        title=_title(config, policy, mesh, engine, where),
        device_kind=devices[0].device_kind,
        chip=chip,
        memory=_memory(devices[0], chip),
        resident=learner.state_bytes(),
        rollout=rollout,
        loading=_loading_bytes(engine, policy),
        on_host=learner.parts_on_host,
        keeps_cache=not engine.free_cache_engine,
        programs=programs,
        failed=failed,
        cures=[],
        lengths=lengths.source,
        waiting=1 - int(drawn.sum()) / (engine.num_slots * expected),
    )
    if report.fits:
        return report
    return dataclasses.replace(report, cures=list(_cures(config, report, mesh, engine)))


def _loading_bytes(engine: Engine, policy: Policy) -> int:
    """Bytes of one device that loading the parameters to sample with takes besides them."""
    largest, moved = engine.verbs.loading(policy)
    if moved is None:
        return largest
    traced, _ = moved
    memory = lowered(traced, policy.mesh.devices.flat[0]).compile().memory_analysis()
    return largest + memory.temp_size_in_bytes + memory.output_size_in_bytes


def _host_mesh(config: ConfigDict, mesh, host: list):
    """The mesh of one host, which samples over its devices, `host`."""
    sizes = dict(config.mesh) | {"data": 1, "fsdp": -1, "sequence": 1, "dcn_data": 1}
    rest = len(host)
    for name in ("tensor", "expert"):
        sizes[name] = math.gcd(sharding.mesh_axis_size(mesh, name), rest)
        rest //= sizes[name]
    return sharding.make_mesh(**sizes, devices=host)


def _title(config, policy, mesh, engine: Engine, where: str) -> str:
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(policy.abstract_params()))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    own = " x ".join(
        f"{name} {n}" for name, n in engine.policy.mesh.shape.items() if name != "fsdp"
    )
    data = config.data
    return (
        f"{config.actor_rollout_ref.model.path}: {count / 1e9:.3g}B parameters on {where} "
        f"({_num_processes(mesh)} host(s); mesh {axes}; a host samples on {own}, "
        f"{engine.num_slots} slots, attention {engine.verbs.attention}); "
        f"{data.train_batch_size} prompts x {config.algorithm.num_generations} completions, "
        f"{data.max_prompt_length} + {data.max_response_length} tokens, "
        f"gradient_checkpointing={config.trainer.gradient_checkpointing}"
    )


def _traced(
    config, engine: Engine, learner: Learner, sampling: SamplingParams
) -> dict[str, tuple[jax.stages.Traced, int]]:
    """The programs of an iteration, and how often their loops without a fixed end turn."""
    P, G = config.data.train_batch_size, config.algorithm.num_generations
    # All prompts and completions of the iteration have full length.
    completion = Completion.sampled(*np.zeros((2, config.data.max_response_length)), "length")
    prompt = [0] * config.data.max_prompt_length
    sequences = Sequences([prompt] * P, [[completion] * G] * P)
    of_rollout = {name: (traced, 1) for name, traced in engine.trace(sampling).items()}
    return of_rollout | traced_learning(learner, sequences)


def traced_learning(
    learner: Learner, sequences: Sequences
) -> dict[str, tuple[jax.stages.Traced, int]]:
    """The programs "update", and "anchor" where other policies run over the completions.

    A policy from a folder whose log-probs are read has a program of its own, by its name.
    """
    abstract = sharding.BatchSharding(learner.policy.mesh).abstract
    state, shape_PG, traced = learner.abstract_state(), sequences.lengths.shape, {}
    if run := learner.other_params(state).keys():
        whole = learner.laid_out(sequences, abstract=True)
        whole_batch, fixed = abstract(whole.batch), learner.fixed_forwards
        if run - fixed.keys():
            traced["anchor"] = learner.forward.trace(state.params, whole_batch), whole.num_micro
        for name, forward in fixed.items():
            traced[name] = forward.trace(state.fixed_params[name], whole_batch), whole.num_micro
    entropy_P = np.zeros(shape_PG[0]) if learner.algorithm.needs_entropy else None
    rewards = np.zeros((*shape_PG, 1) if learner.algorithm.decouples_rewards else shape_PG)
    scores = learner.algorithm.judge(rewards, entropy_P=entropy_P)
    rows = range(learner.plan.mini_prompts)
    others = dict.fromkeys(learner.other_policies, sequences.values("sampler"))
    mini = dataclasses.replace(sequences, log_probs=others).select(rows)
    mini = learner.laid_out(mini, whole_groups=learner.keeps_groups_whole, abstract=True)
    scores = jax.tree.map(lambda x: x[: len(rows)], jax.device_get(scores))
    part = abstract((mini.batch, scores, mini.log_probs))
    traced["update"] = learner.update.trace(state, *part), mini.num_micro
    return traced


def _own_prompts(config, num_processes: int) -> int:
    """Prompts of an iteration that one process samples from."""
    return -(-config.data.train_batch_size // num_processes)


def _per_pair(model: ModelConfig) -> int:
    """Operations of a query and a key that it sees, in all layers.

    They are two products, of 2 D operations each, in every head of every layer that has full
    attention.
    """
    full = model.num_layers - sum(map(model.is_linear, range(model.num_layers)))
    per_pair = 4 * model.num_heads * model.head_dim * full
    if model.global_layers:
        count = sum(map(model.is_global, range(model.num_layers)))
        per_pair += 4 * model.num_heads * (model.global_layers.head_dim - model.head_dim) * count
    return per_pair


def _least(config, engine: Engine, mesh, fixed: Mapping[str, Policy]) -> dict[str, Least]:
    """What a call of each program cannot do without; completions have full length.

    Of the forward passes of an update the attention of one is counted, and 2.5 times as much of its
    backward pass (five products for two).
    """
    layout, data, per_pair = engine.verbs.layout, config.data, _per_pair(engine.policy.config)
    P, G = data.train_batch_size, config.algorithm.num_generations
    prompt, response = data.max_prompt_length, data.max_response_length
    pairs = P * forecast.causal_pairs(prompt, response, G)
    local, slots = engine.policy.mesh.size, engine.num_slots
    rows = -(-slots // G)
    own = (response + 1) // 2  # tokens behind a sample, on average over its steps
    seen = slots * own + rows * (prompt - 1)
    # The state of linear attention is read and written.
    state = 2 * layout.linear.row_bytes() * slots if layout.linear else 0
    splits = (layout.token_bytes() * seen + state) // local
    weights = sharding.device_bytes(engine.verbs.abstract_params())
    prefill_pairs = engine.prefill_rows * prompt * (prompt - 1) // 2 // engine.prefill_pieces
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    return {
        "prefill": Least(per_pair * prefill_pairs // local),
        "decode": Least(per_pair * slots * (own + prompt) // local, weights + splits),
        "anchor": Least(per_pair * pairs // mesh.size),
        **{
            name: Least(_per_pair(other.config) * pairs // mesh.size)
            for name, other in fixed.items()
        },
        "update": Least(int(3.5 * per_pair * pairs * mini / P) // mesh.size),
    }


def _calls(config, engine: Engine, learner: Learner, *, num_processes: int) -> dict[str, int]:
    """How often each program runs in an iteration whose completions all have full length."""
    own = _own_prompts(config, num_processes)
    rows = engine.prefill_rows
    waves = -(-own * config.algorithm.num_generations // engine.num_slots)
    return {
        "prefill": -(-own // rows) * engine.prefill_pieces,
        "decode": waves * config.data.max_response_length,
        "anchor": 1,
        "reference": 1,
        "teacher": 1,
        "update": learner.plan.updates_per_iteration,
    }


def _compiled(
    name: str,
    traced: jax.stages.Traced,
    devices: Sequence[jax.Device],
    turns: int,
    calls: int,
    least: Least,
    chip: Chip | None,
    slices: Sequence[int],
    steps_of_call: int,
) -> ProgramCost:
    """A program as it is compiled; where a call makes several steps, one of them."""
    started = time.perf_counter()
    compiled = lowered(traced, devices[0]).compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    # No device has rows left where routers choose evenly.
    read = functools.partial(
        Program, compiled.as_text(), turns, slices, not_entered=(OF_ROWS_LEFT,)
    )
    program = read()
    # What comes before the loop of the steps, and after it, is shared out over them.
    call = program if steps_of_call == 1 else read(outer_turns=steps_of_call)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = memory.argument_size_in_bytes + results
    asked = traced_flops(traced, turns, of_experts=False)
    others = program.flops_without(GROUPED_PRODUCTS)
    of_attention = least.kernel_flops if has_kernels(traced) else 0
    # What experts multiply depends on what routers choose: this is the room for it, and the rows
    # of an even choice where nothing is exchanged.
    of_experts = (traced_flops(traced, turns) - asked) // len(devices)
    kernel_s, linked_s = None, 0.0
    if chip is not None:
        launch = forecast.LAUNCH_S.get("gpu" if chip.gpu else "tpu", 0.0)
        # Kernels read what is seen, each its part of it.
        kernels = program.kernel_calls
        share = (moved if least.moved is None else least.moved) // max(sum(kernels.values()), 1)
        of_kernels = dict.fromkeys(kernels, share if name == "decode" else 0)
        kernel_s = call.seconds(chip.flops, chip.bandwidth, launch=launch, of_kernels=of_kernels)
        kernel_s = kernel_s / steps_of_call + of_attention / chip.flops
        if program.flops == others:  # else they are counted
            kernel_s += of_experts / chip.flops
        linked_s = sum(c.bytes for c in call.collectives) / (chip.link or chip.bandwidth)
        linked_s /= steps_of_call
    return ProgramCost(
        name=name,
        calls=calls,
        temporary=memory.temp_size_in_bytes + results,
        moved=moved if least.moved is None else least.moved,
        flops=others + of_attention + int(of_experts / (ROOM if has_exchange(traced) else 1)),
        balance=others * len(devices) / max(asked, 1),
        collectives=program.collectives,
        launches=round(call.launches / steps_of_call),
        compile_s=seconds,
        kernel_s=kernel_s,
        linked_s=linked_s,
    )


def _hbm_text(error: str) -> str:
    """The compiler's sentence on how much was needed and how much there is."""
    sentences = [line.strip() for line in error.splitlines() if "hbm" in line.lower()]
    return sentences[0][:200] if sentences else error.splitlines()[0][:200]


def _cures(config, report: Report, mesh, engine: Engine) -> Iterator[str]:
    """Settings that would lower the peak, with the bytes of one device that each frees."""
    rollout_config = config.actor_rollout_ref.rollout
    names = [n for n, peak in report.peaks.items() if peak > (report.memory or peak)]
    names += list(report.failed)
    copy, cache = (report.rollout[name] for name in (COPY, "cache"))
    local, tensor = engine.policy.mesh.size, engine.policy.mesh.shape["tensor"]
    decoding = {"prefill", "decode"}
    if tensor < local and {LOADING, *decoding} & set(names):
        yield (
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={2 * tensor} frees "
            f"{readable(copy // 2)} while sampling"
        )
    if decoding & set(names):
        if engine.num_slots > engine.shards:
            yield (
                f"actor_rollout_ref.rollout.num_slots={engine.num_slots // 2} frees "
                f"{readable(cache // 2)} while sampling"
            )
        if rollout_config.cache_dtype != "int8":
            yield (
                "actor_rollout_ref.rollout.cache_dtype=int8 frees about "
                f"{readable(cache // 2)} while sampling"
            )
    if set(names) - {LOADING, *decoding}:
        temporary = max((p.temporary for p in report.programs if p.name in names), default=None)
        half = "about half of the activations"
        if temporary is not None:
            half = f"about {readable(temporary // 2)}"
        if smaller := _smaller_micro(config, mesh):
            yield f"trainer.per_device_train_batch_size={smaller} frees {half} of an update"
        if config.trainer.gradient_checkpointing not in ("full", "offload"):
            yield "trainer.gradient_checkpointing=full keeps one layer's activations at a time"
        if config.trainer.gradient_checkpointing == "full":
            yield (
                "trainer.gradient_checkpointing=offload frees "
                f"{readable(_between_layers(config, engine.policy, mesh))} of an update"
            )
        is_packed = config.actor_rollout_ref.actor.layout == "packed"
        has_halves = is_packed and not engine.policy.config.linear_attention
        if mesh.shape["fsdp"] % 2 == 0 and has_halves:
            shares = 2 * sharding.BatchSharding(mesh).num_shares
            yield f"mesh.sequence={shares}, devices of mesh.fsdp, frees {half} of an update"
        is_shared = sharding.BatchSharding(mesh).num_shares > 1
        if is_shared and config.actor_rollout_ref.actor.sequence_exchange != "ring":
            yield (
                "actor_rollout_ref.actor.sequence_exchange=ring holds a few shares of a layer's "
                "keys and values in an update, in place of all (auto does from 1 GiB on)"
            )
        if not engine.free_cache_engine:
            freed = readable(cache)
            yield f"actor_rollout_ref.rollout.free_cache_engine=True frees {freed} in the update"
    waits = {"optimizer": "actor_rollout_ref.actor.optimizer_offload", "anchor": "anchor.offload"}
    for part, setting in waits.items():
        size = report.resident[part]
        if size and part not in report.on_host and PROGRAM_OF[part] not in names:
            yield f"{setting}=True frees {readable(size)} but for the {PROGRAM_OF[part]}"
    if report.resident["anchor"]:
        yield f"anchor.mode=on_policy frees {readable(report.resident['anchor'])}"
    if mesh.shape["data"] > 1:
        state = sum(report.resident.values())
        yield (
            f"mesh.data=1, its devices given to mesh.fsdp, frees "
            f"{readable(state - state // mesh.shape['data'])}"
        )
    state = sum(report.resident.values())
    yield f"twice the devices on mesh.fsdp frees {readable(state // 2)} of the state"


def _between_layers(config, policy: Policy, mesh) -> int:
    """Bytes of one device of the hidden states between layers, those of a micro-batch."""
    spread, G = sharding.BatchSharding(mesh), config.algorithm.num_generations
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    count = config.trainer.per_device_train_batch_size or mini * G // spread.num_shards
    tokens = (
        count * config.data.max_response_length + -(-count // G) * config.data.max_prompt_length
    )
    width = policy.config.hidden_size * policy.dtype.itemsize
    return policy.config.num_layers * tokens * width // spread.num_shares


def _smaller_micro(config, mesh) -> int:
    """Completions a device of the next smaller micro-batch that works; 0 where there is none."""
    num_shards, G = sharding.BatchSharding(mesh).num_shards, config.algorithm.num_generations
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    now = config.trainer.per_device_train_batch_size or mini * G // num_shards
    smaller = config.copy_and_resolve_references()
    for size in range(now // 2, 0, -1):
        smaller.trainer.per_device_train_batch_size = size
        try:
            batch_plan(smaller, num_shards=num_shards)
        except ValueError:
            continue
        return size
    return 0


def _num_processes(mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def _memory(device, chip: Chip | None) -> int | None:
    if chip is not None:
        return chip.usable
    try:
        return device.memory_stats()["bytes_limit"]
    except (TypeError, KeyError, jax.errors.JaxRuntimeError):
        return None
