"""Checks of the configuration that only several keys together, or a command line, can fail."""

import difflib

from ml_collections import ConfigDict

from adpo_jax.config import default_config, keys

ADPO_ONLY = (
    "tau",
    "use_adaptive_tau",
    "adaptive_tau_alpha",
    "adaptive_tau_min",
    "adaptive_tau_mode",
    "adaptive_tau_max",
    "beta_reward",
    "length_normalize",
)
GRPO_ONLY = ("clip_low", "clip_high", "loss_aggregation")
WITHOUT_EFFECT = {
    "adpo": GRPO_ONLY,
    "grpo": ADPO_ONLY,
    "rloo": (*ADPO_ONLY, *GRPO_ONLY, "scale_rewards"),
}


def finalized(config: ConfigDict) -> ConfigDict:
    """A locked copy with derived defaults filled in, after `validate`."""
    config = ConfigDict(config).copy_and_resolve_references()
    with config.unlocked():
        actor = config.actor_rollout_ref.actor
        actor.ppo_mini_batch_size = actor.ppo_mini_batch_size or config.data.train_batch_size
        remat = str(config.trainer.gradient_checkpointing).lower()
        spelled = {"true": "full", "false": "none"}
        config.trainer.gradient_checkpointing = spelled.get(remat, remat)
    validate(config)
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Checks what only several keys together can get wrong.

    Raises:
      ValueError: with what was wanted, what was given and the cure.
    """
    _require_at_least(
        config,
        {
            "algorithm.num_generations": 2,
            "algorithm.filter_max_attempts": 1,
            "data.train_batch_size": 1,
            "data.max_prompt_length": 1,
            "data.max_response_length": 1,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
            "actor_rollout_ref.actor.ppo_epochs": 1,
            "trainer.per_device_train_batch_size": 0,
            "trainer.total_epochs": 1,
            "trainer.save_freq": 0,
            "trainer.save_total_limit": 1,
            "trainer.test_freq": 0,
            "trainer.log_samples_freq": 0,
            "trainer.log_num_samples": 0,
            "trainer.seed": 0,
            "data.max_val_samples": 0,
            "actor_rollout_ref.actor.grad_clip": 0,
            "actor_rollout_ref.actor.optim.lr": 0,
            "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
            "actor_rollout_ref.actor.optim.weight_decay": 0,
            "actor_rollout_ref.rollout.num_slots": 0,
            "actor_rollout_ref.model.lora_rank": 0,
            "eval.n": 0,
            "eval.max_tokens": 0,
            "sft.lr": 0,
            "sft.lr_warmup_steps": 0,
            "sft.weight_decay": 0,
            "sft.steps": 0,
            "sft.batch_size": 1,
        },
    )
    if config.trainer.total_training_steps is not None:
        _require_at_least(config, {"trainer.total_training_steps": 1})
    prompts, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if prompts % mini:
        raise ValueError(
            f"actor.ppo_mini_batch_size ({mini} prompts) must divide data.train_batch_size "
            f"({prompts} prompts)"
        )
    if config.algorithm.adv_estimator not in WITHOUT_EFFECT:
        raise ValueError(
            f"algorithm.adv_estimator is one of {', '.join(WITHOUT_EFFECT)}; "
            f"given {config.algorithm.adv_estimator!r}"
        )
    if config.algorithm.adv_estimator == "grpo" and config.anchor.mode != "on_policy":
        raise ValueError(
            "algorithm.adv_estimator=grpo clips the ratio to the policy that sampled, so it needs "
            f"anchor.mode=on_policy; given {config.anchor.mode!r}"
        )
    if config.actor_rollout_ref.rollout.temperature <= 0:
        raise ValueError(
            "actor_rollout_ref.rollout.temperature is above 0: training samples, and greedy "
            "completions of a prompt are all the same. Evaluation is greedy as it is"
        )
    if config.eval.graded_by not in ("accuracy", "reward"):
        raise ValueError(f"eval.graded_by is accuracy or reward, given {config.eval.graded_by!r}")
    if config.eval.ks and not config.eval.n:
        raise ValueError(f"eval.ks={config.eval.ks} has no effect without samples: set eval.n")
    _refuse_what_has_no_effect(config)
    _refuse_lora_without_effect(config)
    if config.sft.steps and not config.sft.train_files:
        raise ValueError(f"sft.steps is {config.sft.steps}, but sft.train_files names no data")


def _refuse_what_has_no_effect(config: ConfigDict) -> None:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    one_step = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
    if algorithm.beta_anchor_kl and one_step and config.anchor.mode == "on_policy":
        raise ValueError(
            f"algorithm.beta_anchor_kl={algorithm.beta_anchor_kl} has no effect on one optimizer "
            "step an iteration under the on-policy anchor, where the KL and its gradient are 0; "
            "set anchor.mode=fixed, or more steps by ppo_epochs or ppo_mini_batch_size"
        )
    published = default_config().algorithm
    unused = WITHOUT_EFFECT[algorithm.adv_estimator]
    changed = [f"algorithm.{key}" for key in unused if algorithm[key] != published[key]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: no effect under adv_estimator={algorithm.adv_estimator}; "
            "leave at the default"
        )


def _refuse_lora_without_effect(config: ConfigDict) -> None:
    model, default = config.actor_rollout_ref.model, default_config().actor_rollout_ref.model
    keys = ("lora_rank", "lora_alpha", "lora_target_modules")
    changed = [f"model.{key}" for key in keys if model[key] != default[key]]
    if model.lora_adapter_path and changed:
        raise ValueError(
            f"{', '.join(changed)}: no effect beside model.lora_adapter_path, whose folder says "
            "rank, alpha and targets; leave at the default"
        )
    if changed and not model.lora_rank:
        raise ValueError(
            f"{', '.join(changed)}: no effect without model.lora_rank, which is 0 (no LoRA)"
        )


def check_overrides(argv: list[str]) -> None:
    """Checks that every `--config.KEY=...` of a command line names a key.

    Raises:
      ValueError: naming the nearest key there is.
    """
    known = set(keys(default_config()))
    for argument in argv:
        key = argument.lstrip("-").split("=", 1)[0]
        if not argument.startswith("-") or not key.startswith("config."):
            continue
        key = key.removeprefix("config.")
        above, _, below = key.rpartition(".")
        if above in known:
            raise ValueError(f"{above} is set as a whole: --config.{above}=\"{{'{below}': ...}}\"")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"the config has no key {key}; did you mean {near}?")


def _require_at_least(config: ConfigDict, minima: dict[str, int]) -> None:
    for key, minimum in minima.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if value < minimum:
            raise ValueError(f"{key} is at least {minimum}, given {value}")
