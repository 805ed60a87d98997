"""The cut of an iteration that a config asks for."""

from ml_collections import ConfigDict

from adpo_jax.update.plan import BatchPlan


def batch_plan(config: ConfigDict, *, num_shards: int) -> BatchPlan:
    """The cut of an iteration over `num_shards` batch shards of the mesh.

    Raises:
      ValueError: when prompts do not spread over the devices, or a micro-batch of rows does not
        hold whole groups that divide the optimizer step; with sizes that would work.
    """
    G = config.algorithm.num_generations
    prompts = config.data.train_batch_size
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    per_device = config.trainer.per_device_train_batch_size
    if mini % num_shards:
        raise ValueError(
            f"an optimizer step of {mini} prompts does not spread over {num_shards} devices "
            "(mesh.data x mesh.fsdp x mesh.expert); make "
            "actor_rollout_ref.actor.ppo_mini_batch_size a multiple of that number"
        )
    if config.sft.steps and config.sft.batch_size % num_shards:
        raise ValueError(
            f"sft.batch_size ({config.sft.batch_size} rows) does not spread over {num_shards} "
            "devices (mesh.data x mesh.fsdp x mesh.expert); make it a multiple of that number"
        )
    epochs, layout = (
        config.actor_rollout_ref.actor.ppo_epochs,
        config.actor_rollout_ref.actor.layout,
    )
    longest = (config.data.max_prompt_length, config.data.max_response_length)
    if layout == "packed":
        return BatchPlan(prompts, mini, mini, epochs, layout, per_device, *longest)
    completions = per_device * num_shards if per_device else mini * G
    micro, rest = divmod(completions, G)
    if rest or micro == 0 or mini % micro or micro % num_shards:
        allowed = [
            m * G // num_shards
            for m in range(num_shards, mini + 1, num_shards)
            if mini % m == 0 and m * G % num_shards == 0
        ]
        raise ValueError(
            "under actor_rollout_ref.actor.layout=rows trainer.per_device_train_batch_size, "
            f"completions a device, times {num_shards} devices must be whole groups of {G} that "
            f"divide an optimizer step of {mini} x {G} = {mini * G} completions. Given "
            f"{per_device}; these work: {allowed}"
        )
    return BatchPlan(prompts, mini, micro, epochs, layout, per_device, *longest)
