"""What to change where a run does not fit."""

from collections.abc import Iterator

from adpo_jax.devices import sharding
from adpo_jax.dry_run.report import COPY, LOADING, PROGRAM_OF, Report
from adpo_jax.engine.cache_plan import readable
from adpo_jax.engine.engine import Engine
from adpo_jax.policy.policy import Policy
from adpo_jax.run.batch_plan import batch_plan


def cures_of(config, report: Report, mesh, engine: Engine) -> Iterator[str]:
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
        if smaller := smaller_micro(config, mesh):
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
    state = sum(report.resident.values())
    if mesh.shape["data"] > 1:
        yield (
            f"mesh.data=1, its devices given to mesh.fsdp, frees "
            f"{readable(state - state // mesh.shape['data'])}"
        )
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


def smaller_micro(config, mesh) -> int:
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
