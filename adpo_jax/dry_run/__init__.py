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
import math

import jax
from ml_collections import ConfigDict

from adpo_jax.devices import sharding
from adpo_jax.devices.chips import Chip, chip_of
from adpo_jax.devices.topologies import lowered, one_host, topology_devices
from adpo_jax.dry_run import forecast
from adpo_jax.dry_run.cures import cures_of
from adpo_jax.dry_run.forecast import Lengths
from adpo_jax.dry_run.programs import compiled, own_prompts, programs_of
from adpo_jax.dry_run.report import COPY, Report
from adpo_jax.engine.engine import Engine
from adpo_jax.policy.policy import Policy
from adpo_jax.run import loading, setup
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.run.config_checks import finalized


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
    G, prompt = config.algorithm.num_generations, config.data.max_prompt_length
    drawn = lengths.draw(own_prompts(config, hosts) * G)
    expected_steps = forecast.decode_steps(drawn, engine.num_slots)
    asked = programs_of(
        config,
        engine,
        learner,
        sampling,
        num_processes=hosts,
        expected_steps=expected_steps,
        expected_share=(prompt + G * drawn.mean()) / (prompt + G * config.data.max_response_length),
    )
    programs, failed = [], {}
    for name, program in asked.items():
        try:
            of_processes = config.mesh.dcn_data > 1
            programs.append(compiled(name, program, chip, of_processes=of_processes))
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
        waiting=1 - int(drawn.sum()) / (engine.num_slots * expected_steps),
    )
    if report.fits:
        return report
    return dataclasses.replace(report, cures=list(cures_of(config, report, mesh, engine)))


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


def _hbm_text(error: str) -> str:
    """The compiler's sentence on how much was needed and how much there is."""
    sentences = [line.strip() for line in error.splitlines() if "hbm" in line.lower()]
    return sentences[0][:200] if sentences else error.splitlines()[0][:200]


def _num_processes(mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def _memory(device, chip: Chip | None) -> int | None:
    if chip is not None:
        return chip.usable
    try:
        return device.memory_stats()["bytes_limit"]
    except (TypeError, KeyError, jax.errors.JaxRuntimeError):
        return None
