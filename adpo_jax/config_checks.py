"""Checks of the configuration that only several keys together, or a command line, can fail."""

import difflib
import fnmatch
import re
from pathlib import PurePath

from ml_collections import ConfigDict

from adpo_jax import metric_names
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

_SAMPLED = ("ks", "temperature", "top_p", "top_k", "min_p")
_EVAL = ("n", *_SAMPLED, "max_tokens", "graded_by", "category_key")
_SFT = (
    "completion_key",
    "batch_size",
    "save_freq",
    "lr",
    "lr_warmup_steps",
    "weight_decay",
    "betas",
)

# Keys, what they have an effect under, and whether that is so. What only paces or shapes a stage
# that a config describes does not stop it from being switched off by one key: test_freq without
# val_files, and sft.lr with train_files but 0 steps.
_NEEDS = (
    (("anchor.ema_alpha",), "anchor.mode=ema", lambda c: c.anchor.mode == "ema"),
    (
        ("anchor.kl_threshold",),
        "anchor.mode=kl_triggered",
        lambda c: c.anchor.mode == "kl_triggered",
    ),
    (("anchor.offload",), "an anchor.mode that keeps one", lambda c: c.anchor.mode != "on_policy"),
    (
        tuple(f"algorithm.adaptive_tau_{key}" for key in ("alpha", "min", "mode", "max")),
        "algorithm.use_adaptive_tau=true",
        lambda c: c.algorithm.use_adaptive_tau,
    ),
    (
        ("algorithm.adaptive_tau_max",),
        "algorithm.adaptive_tau_mode=policy_entropy",
        lambda c: c.algorithm.adaptive_tau_mode == "policy_entropy",
    ),
    (
        ("algorithm.filter_max_attempts",),
        "algorithm.filter_groups=true",
        lambda c: c.algorithm.filter_groups,
    ),
    (
        ("custom_reward_function.timeout_s", "custom_reward_function.on_timeout"),
        "custom_reward_function.num_workers above 0",
        lambda c: c.custom_reward_function.num_workers,
    ),
    (
        ("custom_reward_function.name",),
        "its being the only one (reward_functions takes its place)",
        lambda c: not c.reward_functions,
    ),
    (
        ("data.system_prompt", "data.chat_template_kwargs"),
        "data.apply_chat_template=true",
        lambda c: c.data.apply_chat_template,
    ),
    (
        ("actor_rollout_ref.actor.optim.min_lr_ratio",),
        "a schedule that falls (actor.optim.lr_scheduler_type=cosine or linear)",
        lambda c: c.actor_rollout_ref.actor.optim.lr_scheduler_type != "constant",
    ),
    (
        ("data.max_val_samples", "data.val_split", *(f"eval.{key}" for key in _EVAL)),
        "data.val_files",
        lambda c: c.data.val_files,
    ),
    (
        ("trainer.best_metric",),
        "data.val_files",
        lambda c: c.data.val_files or not c.trainer.best_metric.startswith("eval/"),
    ),
    (
        tuple(f"eval.{key}" for key in _SAMPLED),
        "samples (eval.n above 0): the greedy answer has none",
        lambda c: c.eval.n,
    ),
    (
        tuple(f"sft.{key}" for key in _SFT),
        "a cold start (sft.train_files and sft.steps)",
        lambda c: c.sft.train_files,
    ),
    (
        ("trainer.total_epochs",),
        "leaving trainer.total_training_steps out, which wins over it",
        lambda c: c.trainer.total_training_steps is None,
    ),
    (
        ("trainer.log_num_samples",),
        "trainer.log_samples_freq above 0",
        lambda c: c.trainer.log_samples_freq,
    ),
    (
        ("trainer.max_bad_updates",),
        "trainer.on_bad_update=skip",
        lambda c: c.trainer.on_bad_update == "skip",
    ),
)

_LEAST = {
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
    "trainer.max_save_failures": 1,
    "trainer.max_bad_updates": 1,
    "trainer.max_anchor_kl": 0,
    "trainer.grace_period_s": 0,
    "data.max_val_samples": 0,
    "actor_rollout_ref.actor.grad_clip": 0,
    "actor_rollout_ref.actor.optim.lr": 0,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "actor_rollout_ref.actor.optim.weight_decay": 0,
    "actor_rollout_ref.rollout.num_slots": 0,
    "actor_rollout_ref.model.lora_rank": 0,
    "eval.n": 0,
    "eval.max_tokens": 0,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 0,
    "sft.lr": 0,
    "sft.lr_warmup_steps": 0,
    "sft.weight_decay": 0,
    "sft.steps": 0,
    "sft.batch_size": 1,
    "sft.save_freq": 0,
}

_CHOICES = {
    "trainer.on_bad_update": ("stop", "skip"),
    "trainer.gradient_checkpointing": ("none", "full", "save_dots"),
    "actor_rollout_ref.rollout.cache_dtype": ("", "float32", "bfloat16", "int8"),
    "data.overlong_prompts": ("filter", "truncate"),
    "eval.graded_by": ("accuracy", "reward"),
    "algorithm.adv_estimator": tuple(WITHOUT_EFFECT),
}

# What a folder may be named: one part of a path, and no hidden one.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@,-]*")


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
    _require_at_least(config, _LEAST)
    if config.trainer.total_training_steps is not None:
        _require_at_least(config, {"trainer.total_training_steps": 1})
    prompts, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    if prompts % mini:
        raise ValueError(
            f"actor.ppo_mini_batch_size ({mini} prompts) must divide data.train_batch_size "
            f"({prompts} prompts)"
        )
    for key, choices in _CHOICES.items():
        if _value(config, key) not in choices:
            given = _value(config, key)
            raise ValueError(f"{key} is one of {', '.join(filter(None, choices))}; given {given!r}")
    for key in ("actor_rollout_ref.actor.optim.betas", "sft.betas"):
        betas = _value(config, key)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"{key} are two numbers in [0, 1), given {tuple(betas)}")
    if not 0.0 <= config.actor_rollout_ref.actor.optim.min_lr_ratio <= 1.0:
        ratio = config.actor_rollout_ref.actor.optim.min_lr_ratio
        raise ValueError(f"actor_rollout_ref.actor.optim.min_lr_ratio is in [0, 1], given {ratio}")
    _check_paths(config)
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
    if config.sft.steps and not config.sft.train_files:
        raise ValueError(f"sft.steps is {config.sft.steps}, but sft.train_files names no data")
    _refuse_what_has_no_effect(config)
    _refuse_lora_without_effect(config)
    _check_best_metric(config)


def _refuse_what_has_no_effect(config: ConfigDict) -> None:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    one_step = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
    for key in ("algorithm.beta_anchor_kl", "trainer.max_anchor_kl"):
        if _value(config, key) and one_step and config.anchor.mode == "on_policy":
            raise ValueError(
                f"{key}={_value(config, key)} has no effect on one optimizer step an iteration "
                "under the on-policy anchor, where the KL and its gradient are 0; set "
                "anchor.mode=fixed, or more steps by ppo_epochs or ppo_mini_batch_size"
            )
    default = default_config()
    for needing, need, is_met in _NEEDS:
        changed = [key for key in needing if _value(config, key) != _value(default, key)]
        if changed and not is_met(config):
            raise ValueError(
                f"{changed[0]}={_value(config, changed[0])} has no effect without {need}; leave it "
                f"at the default ({_value(default, changed[0])}) or see to that too"
            )
    published = default.algorithm
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


def _check_best_metric(config: ConfigDict) -> None:
    """By a name that no row has, no checkpoint would ever be the best."""
    name = config.trainer.best_metric
    names = metric_names.of_rows(
        config.algorithm.adv_estimator,
        filtered=config.algorithm.filter_groups,
        evaluated=bool(config.data.val_files),
        num_samples=config.eval.n,
        ks=tuple(config.eval.ks),
        by_category=bool(config.eval.category_key),
    )
    if name and not any(fnmatch.fnmatchcase(name, pattern) for pattern in names):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"trainer.best_metric={name}: no row of this run has it; did you mean {near}? "
            "docs/metrics.md lists them"
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
        value = _value(config, key)
        if not minimum <= value < float("inf"):  # NaN is neither
            raise ValueError(f"{key} is at least {minimum}, given {value}")


def _value(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _check_paths(config: ConfigDict) -> None:
    """Nothing that a config names is written outside the run's folder."""
    for key in ("trainer.project_name", "trainer.experiment_name"):
        if not _NAME.fullmatch(_value(config, key)):
            raise ValueError(
                f"{key} is the name of a folder, letters, digits and _.+=@,- without a leading "
                f"dot; given {_value(config, key)!r}. --workdir takes any path"
            )
    folder = PurePath(config.trainer.rollout_data_dir)
    if folder.is_absolute() or ".." in folder.parts:
        raise ValueError(
            "trainer.rollout_data_dir is a folder of its own within the run's folder; given "
            f"{str(folder)!r}"
        )
