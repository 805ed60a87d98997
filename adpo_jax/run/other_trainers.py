"""What verl, TRL and Tunix call things, so that what their users bring is taken as it is.

docs/coming_from.md has the same names, and a test holds the two in step.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

# Names in verl's trainer.logger of what every run writes anyway.
_WRITTEN_ANYWAY = ("console", "tensorboard")


class Cure(NamedTuple):
    """What stands here for a name of another trainer.

    Attributes:
      trainers: whose name it is.
      keys: the keys of our config.
      text: what else to do; where there are keys, how to set them.
    """

    trainers: str
    keys: tuple[str, ...]
    text: str = ""

    def __str__(self) -> str:
        parts = [" and ".join(self.keys)] if self.keys else []
        return ": ".join(parts + ([self.text] if self.text else []))


def taken_as_given(config: ConfigDict) -> None:
    """Brings what verl's users write into this config's form, in place.

    That is a list of files, as "['a.parquet','b.parquet']", and loggers that need no naming.
    """
    for section, key in (("data", "train_files"), ("data", "val_files"), ("sft", "train_files")):
        config[section][key] = ",".join(_listed(config[section][key], f"{section}.{key}"))
    names = [n for given in config.trainer.logger for n in _listed(given, "trainer.logger")]
    config.trainer.logger = tuple(name for name in names if name not in _WRITTEN_ANYWAY)


def _listed(text: str, key: str) -> list[str]:
    """The texts of a list, with quotation marks or, as Hydra takes it, without; else the text."""
    text = str(text)
    if not text.strip().startswith("[") or _is_file(text):
        return [text]
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        if not text.strip().endswith("]"):
            raise ValueError(f"{key}: the list {text!r} has no end; write ['a','b']") from None
        found = [part.strip() for part in text.strip()[1:-1].split(",")]
    if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
        raise ValueError(f"{key} is a list of texts, as ['a','b']; given {text!r}")
    if odd := [name for name in found if "," in name and key != "trainer.logger"]:
        raise ValueError(f"{key}: a comma ends a file's name, and {odd[0]!r} has one; rename it")
    return found


def _is_file(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # no file has so long a name
        return False


_ROLLOUT, _ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
_REFERENCE = Cure("verl", ("algorithm.beta_reference_kl",), "its weight, 0 for none")
_OVERLONG = Cure("verl", ("data.overlong_prompts",), "filter or truncate")
_MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")
_DEVICES = Cure("verl", _MESH, "all devices of all hosts are used, one process a host")
_ENGINE = "there is one engine, built in: leave it out"
_OPTIMIZER = "actor_rollout_ref.actor.optim"
_AGGREGATION = Cure("verl and Tunix", ("algorithm.loss_aggregation",))
_CORRECTION = (
    "algorithm.sampler_correction",
    "algorithm.correction_level",
    "algorithm.correction_cap",
)
_OF_VLLM = Cure("TRL", _CORRECTION)
_TURNS = ("environment.path", "environment.max_turns")
_LORA = ("actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora_alpha")
_FOLDER = "the flag is --workdir=DIR"
_RESUME = "the flag is --resume=auto, never or must"

# verl's names whole, those of TRL's and Tunix's settings by themselves. A name that is a key here
# too, or the last part of one, needs no entry.
NAMES = {
    f"{_ROLLOUT}.n": Cure("verl", ("algorithm.num_generations",)),
    f"{_ROLLOUT}.name": Cure("verl", (), _ENGINE),
    f"{_ROLLOUT}.enable_chunked_prefill": Cure("verl", (f"{_ROLLOUT}.prefill_chunk_size",)),
    f"{_ROLLOUT}.max_num_batched_tokens": Cure("verl", (f"{_ROLLOUT}.prefill_chunk_size",)),
    f"{_ROLLOUT}.val_kwargs": Cure("verl", ("eval.n", "eval.temperature", "eval.top_p")),
    f"{_ACTOR}.use_kl_loss": _REFERENCE,
    f"{_ACTOR}.kl_loss_coef": _REFERENCE,
    "algorithm.kl_ctrl.kl_coef": _REFERENCE,
    f"{_ACTOR}.clip_ratio_low": Cure("verl", ("algorithm.clip_low",)),
    f"{_ACTOR}.clip_ratio_high": Cure("verl", ("algorithm.clip_high",)),
    f"{_ACTOR}.loss_agg_mode": _AGGREGATION,
    f"{_ACTOR}.clip_ratio": Cure("verl", ("algorithm.clip_low", "algorithm.clip_high")),
    f"{_ACTOR}.clip_ratio_c": Cure("verl", ("algorithm.dual_clip",)),
    f"{_ACTOR}.entropy_coeff": Cure("verl", ("algorithm.entropy_bonus",)),
    f"{_ACTOR}.kl_loss_type": Cure("verl", ("algorithm.kl_estimator",), "k1, k2 or k3"),
    f"{_ROLLOUT}.multi_turn": Cure("verl", _TURNS),
    "algorithm.rollout_correction": Cure("verl", _CORRECTION),
    "algorithm.filter_groups.enable": Cure("verl", ("algorithm.filter_groups",), "true or false"),
    "algorithm.filter_groups.max_num_gen_batches": Cure("verl", ("algorithm.filter_max_attempts",)),
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": Cure(
        "verl", ("trainer.per_device_train_batch_size",), "completions; it changes no result"
    ),
    f"{_ACTOR}.ulysses_sequence_parallel_size": Cure("verl", ("mesh.sequence",)),
    "actor_rollout_ref.model.enable_gradient_checkpointing": Cure(
        "verl", ("trainer.gradient_checkpointing",)
    ),
    "algorithm.norm_adv_by_std_in_grpo": Cure("verl", ("algorithm.scale_rewards",)),
    "distillation.teacher_models": Cure("verl", ("algorithm.adv_estimator", "teacher.path"), "opd"),
    "data.filter_overlong_prompts": _OVERLONG,
    "data.truncation": _OVERLONG,
    "data.apply_chat_template_kwargs": Cure("verl", ("data.chat_template_kwargs",)),
    "custom_reward_function.reward_kwargs": Cure("verl", ("reward_model.reward_kwargs",)),
    "reward_model.overlong_buffer": Cure(
        "verl", ("reward_functions",), "length_penalty is one of those that there are"
    ),
    "trainer.val_only": Cure("verl", (), "`adpo-jax evaluate --model=RUN` evaluates alone"),
    "trainer.resume_mode": Cure("verl", (), _RESUME),
    "trainer.default_local_dir": Cure("verl", (), _FOLDER),
    "trainer.n_gpus_per_node": _DEVICES,
    "trainer.nnodes": _DEVICES,
    "trainer.max_actor_ckpt_to_keep": Cure("verl", ("trainer.save_total_limit",)),
    "model": Cure("TRL", ("actor_rollout_ref.model.path",)),
    "peft_config": Cure("TRL", _LORA),
    "delta": Cure("TRL", ("algorithm.dual_clip",)),
    "importance_sampling_level": Cure("TRL", ("algorithm.adv_estimator",), "gspo for sequence"),
    "vllm_importance_sampling_correction": _OF_VLLM,
    "vllm_importance_sampling_mode": _OF_VLLM,
    "vllm_importance_sampling_cap": _OF_VLLM,
    "tools": Cure("TRL", ("environment.tools",)),
    "environment_factory": Cure("TRL", ("environment.path",)),
    "max_tool_calling_iterations": Cure("TRL", ("environment.max_turns",)),
    "max_completion_length": Cure("TRL", ("data.max_response_length",)),
    "epsilon": Cure("TRL and Tunix", ("algorithm.clip_low",)),
    "epsilon_high": Cure("TRL", ("algorithm.clip_high",)),
    "loss_type": Cure("TRL", ("algorithm.adv_estimator", "algorithm.loss_aggregation")),
    "beta": Cure("TRL and Tunix", ("algorithm.beta_reference_kl",)),
    "teacher_model_name_or_path": Cure("TRL", ("teacher.path",)),
    "sync_ref_model": Cure("TRL", ("anchor.mode",), "ema"),
    "ref_model_mixup_alpha": Cure("TRL", ("anchor.ema_alpha",)),
    "steps_per_generation": Cure("TRL", (f"{_ACTOR}.ppo_mini_batch_size",)),
    "num_iterations": Cure("TRL and Tunix", (f"{_ACTOR}.ppo_epochs",)),
    "generation_batch_size": Cure("TRL", ("data.train_batch_size",), "it counts prompts"),
    "learning_rate": Cure("TRL", (f"{_OPTIMIZER}.lr",)),
    "warmup_steps": Cure("TRL", (f"{_OPTIMIZER}.lr_warmup_steps",)),
    "max_grad_norm": Cure("TRL", (f"{_ACTOR}.grad_clip",)),
    "use_vllm": Cure("TRL", (), _ENGINE),
    "vllm_gpu_memory_utilization": Cure("TRL", (f"{_ROLLOUT}.gpu_memory_utilization",)),
    "vllm_enable_sleep_mode": Cure("TRL", (f"{_ROLLOUT}.free_cache_engine",)),
    "reward_funcs": Cure("TRL", ("reward_functions",)),
    "reward_weights": Cure("TRL", ("reward_functions",), "each has its weight"),
    "num_train_epochs": Cure("TRL", ("trainer.total_epochs",)),
    "max_steps": Cure("TRL and Tunix", ("trainer.total_training_steps",)),
    "save_steps": Cure("TRL", ("trainer.save_freq",)),
    "save_strategy": Cure("TRL", ("trainer.save_freq",)),
    "eval_steps": Cure("TRL", ("trainer.test_freq",)),
    "eval_strategy": Cure("TRL", ("trainer.test_freq",)),
    "eval_on_start": Cure("TRL", ("trainer.val_before_train",)),
    "report_to": Cure("TRL", ("trainer.logger",)),
    "log_completions": Cure("TRL", ("trainer.log_samples_freq",)),
    "resume_from_checkpoint": Cure("TRL", (), _RESUME),
    "output_dir": Cure("TRL", (), _FOLDER),
    "shuffle_dataset": Cure("TRL", ("data.shuffle",)),
    "loss_agg_mode": _AGGREGATION,
    "checkpoint_root_directory": Cure("Tunix", (), _FOLDER),
    "max_tokens_to_generate": Cure("Tunix", ("data.max_response_length",)),
    "algo_variant": Cure("Tunix", ("algorithm.adv_estimator",)),
    "advantage_estimator": Cure("Tunix", ("algorithm.scale_rewards",)),
    "mini_batch_size": Cure("Tunix", (f"{_ACTOR}.ppo_mini_batch_size",)),
    "train_micro_batch_size": Cure("Tunix", ("trainer.per_device_train_batch_size",)),
    "actor_optimizer": Cure("Tunix", (f"{_OPTIMIZER}.lr",)),
    "rollout_engine": Cure("Tunix", (), _ENGINE),
    "kv_cache_size": Cure("Tunix", (f"{_ROLLOUT}.gpu_memory_utilization",)),
    "reward_fns": Cure("Tunix", ("reward_functions",)),
    "role_to_mesh": Cure("Tunix", _MESH),
    "checkpointing_options": Cure("Tunix", ("trainer.save_freq", "trainer.save_total_limit")),
    "eval_every_n_steps": Cure("Tunix", ("trainer.test_freq",)),
    "metrics_logging_options": Cure("Tunix", ("trainer.logger",)),
}


def cure_of(key: str) -> Cure | None:
    """What stands here for another trainer's name; None where there is no such name.

    verl's may lack `actor_rollout_ref.` or lie below a name that has an entry, and those of TRL and
    Tunix may stand alone or in the sections that have most of what these are settings of.
    """
    above, _, last = key.rpartition(".")
    # Elsewhere the last part of a name may mean something of ours: `teacher.model`.
    bare = last if above in ("", "trainer", "algorithm", "data") else ""
    names = [key, *([above] if "." in above else [])]
    names = [name for whole in names for name in (whole, f"actor_rollout_ref.{whole}")]
    return next((NAMES[name] for name in (*names, bare) if name in NAMES), None)
