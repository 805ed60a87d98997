"""The configuration: every key there is, its default, and what it means.

`configs/*.py` start from `default_config()` and change what they need. The dictionary is locked, so
a misspelt key stops the run and names the nearest one. Units are in the comments; "prompts" count
distinct prompts, "completions" count their samples. What one key allows is checked by whoever uses
it (an algorithm checks its own parameters); `validate` checks what only several keys together can
get wrong. An empty string means "not set".
"""

import dataclasses
import difflib

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

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


def default_config() -> ConfigDict:
    """All keys with the published defaults of ADPO where there are any."""
    config = ConfigDict(
        {
            "algorithm": _algorithm(),
            "anchor": _anchor(),
            "custom_reward_function": _reward_function(),
            # Keywords for the reward function, e.g. {"ngram_size": 4}.
            "reward_model": {"reward_kwargs": {}},
            # Several functions whose weighted rewards add up, in place of custom_reward_function's:
            # ({"name": "good_accuracy", "weight": 1.0}, {"path": "mine.py", "name": "f", ...}).
            "reward_functions": (),
            "data": _data(),
            "actor_rollout_ref": {"model": _model(), "actor": _actor(), "rollout": _rollout()},
            "sft": _sft(),
            "mesh": _mesh(),
            "trainer": _trainer(),
        }
    )
    return config.lock()


def _algorithm() -> dict:
    return {
        "adv_estimator": "adpo",  # adpo | grpo
        "num_generations": 8,  # completions a prompt, >= 2
        "tau": 0.8,  # temperature of the anchored policy distribution
        "use_adaptive_tau": True,
        "adaptive_tau_alpha": 0.5,
        "adaptive_tau_min": 0.05,  # floor of the adapted tau
        "adaptive_tau_mode": "target_entropy",  # target_entropy | policy_entropy
        "adaptive_tau_max": placeholder(float),  # ceiling under policy_entropy; None for no ceiling
        "beta_reward": 0.5,  # temperature of the target distribution
        "scale_rewards": "group",  # group | batch | none
        "min_reward_std": 0.0,  # a group whose rewards spread less counts as all equal
        "beta_anchor_kl": 0.0,  # coefficient of the k3 penalty
        "drop_all_failed_prompts": False,  # prompts whose rewards are all <= 0 leave the loss
        "length_normalize": False,  # divide a completion's log-prob by its number of tokens
        # grpo alone:
        "clip_low": 0.2,
        "clip_high": 0.2,
        "loss_aggregation": "token-mean",  # token-mean | sequence-mean
    }


def _anchor() -> dict:
    return {
        "mode": "on_policy",  # on_policy | fixed | ema | kl_triggered
        "ema_alpha": 0.99,  # weight of the old anchor, each iteration
        "kl_threshold": 0.1,  # nats a token
    }


def _reward_function() -> dict:
    return {
        "path": "",  # a Python file; "" for a built-in function
        "name": "good_accuracy",  # f(completions, solution, **columns) -> list[float]
        "num_workers": 0,  # processes that grade while others decode; 0 grades in this one
        "timeout_s": 10.0,  # a completion that takes longer is given up (with workers)
        "on_timeout": "zero",  # zero | stop
    }


def _data() -> dict:
    return {
        # A .jsonl, .json or .parquet file, a folder of them, several of either (comma-separated),
        # a Hugging Face data set name, or "embedded:arithmetic".
        "train_files": "embedded:arithmetic",
        "val_files": "",  # "" for no evaluation
        "train_split": "train",  # of a Hugging Face data set
        "val_split": "test",
        "prompt_key": "question",
        # Compared with the model's answer, after "####" where there is one; the reward function
        # gets it as `solution`. Evaluation grades with good_accuracy whatever the reward is.
        "answer_key": "answer",
        "prompt_template": "{prompt}",  # {prompt} and {any_column} are filled in
        "system_prompt": "",
        "apply_chat_template": True,  # where the tokenizer has one
        "chat_template_kwargs": {},  # e.g. {"enable_thinking": False}
        "max_prompt_length": 512,  # tokens
        "overlong_prompts": "filter",  # filter | truncate (keeps the end)
        "max_response_length": 1024,  # tokens
        "train_batch_size": 128,  # prompts an iteration
        "max_val_samples": 0,  # evaluate on the first so many rows; 0 for all
    }


def _model() -> dict:
    return {
        # A folder or Hub name with config.json and safetensors, or "embedded:arithmetic".
        "path": "embedded:arithmetic",
        "hf_config": {},  # overrides of config.json; with random_init, any size by one line
        "random_init": False,  # start from random weights, not from those in the folder
    }


def _actor() -> dict:
    return {
        "optim": {
            "lr": 1e-6,
            "weight_decay": 0.01,  # not on norms and biases
            "lr_warmup_steps": 0,  # optimizer steps
            "lr_scheduler_type": "constant",  # constant | cosine | linear
            "min_lr_ratio": 0.0,  # where cosine and linear end, as a fraction of lr
            "betas": (0.9, 0.999),
        },
        "grad_clip": 1.0,  # global norm; 0 for none
        "ppo_mini_batch_size": 0,  # prompts an optimizer step; 0 for the whole iteration
        "ppo_epochs": 1,  # passes over an iteration's completions
    }


def _rollout() -> dict:
    return {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,  # -1 for all tokens
        "min_p": 0.0,
        "num_slots": 0,  # completions decoded at once; 0 for as many as fit (64 on a CPU)
        "cache_dtype": "",  # of keys and values: float32 | bfloat16 | int8; "" for that of compute
        "attention": "auto",  # decode kernel: auto | xla | pallas_tpu | pallas_gpu
        "free_cache_engine": True,  # give the KV cache back before the update
        "gpu_memory_utilization": 0.6,  # share of the device's memory the rollout may use
    }


def _sft() -> dict:
    return {
        "steps": 0,  # optimizer steps of supervised training before the first iteration; 0 for none
        "train_files": "",  # as data.train_files; rows with a prompt and a completion
        "completion_key": "completion",  # the column with the text to imitate
        "batch_size": 64,  # rows a step
        "lr": 1e-3,
        "lr_warmup_steps": 20,
        "weight_decay": 0.01,
        "betas": (0.9, 0.999),
    }


def _mesh() -> dict:
    return {
        "data": 1,  # replicas of the parameters
        "fsdp": -1,  # parameters and batch split; -1 for the remaining devices
        "tensor": 1,  # heads, MLP and vocabulary split
    }


def _trainer() -> dict:
    return {
        "project_name": "adpo_jax",
        "experiment_name": "default",
        "total_epochs": 1,  # passes over the training prompts
        "total_training_steps": placeholder(int),  # iterations; wins over total_epochs
        "per_device_train_batch_size": 0,  # completions a device holds at once; 0 for all
        "gradient_checkpointing": "none",  # none | full | save_dots; "true" means full
        "bf16": True,  # compute in bfloat16; parameters and optimizer stay float32
        "save_freq": 50,  # iterations; 0 for the end alone
        "save_total_limit": 3,  # checkpoints kept
        "test_freq": 50,  # iterations; 0 for before and after alone
        "log_samples_freq": 10,  # iterations between printed samples; 0 for never
        "log_num_samples": 2,
        "seed": 0,
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
    if config.algorithm.adv_estimator not in ("adpo", "grpo"):
        raise ValueError(
            f"algorithm.adv_estimator is adpo or grpo, given {config.algorithm.adv_estimator!r}"
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
    _refuse_what_has_no_effect(config)
    if config.sft.steps and not config.sft.train_files:
        raise ValueError(f"sft.steps is {config.sft.steps}, but sft.train_files names no data")


def _plain(default):
    """A default's value; that of a placeholder is None."""
    return default.get() if isinstance(default, FieldReference) else default


def _refuse_what_has_no_effect(config: ConfigDict) -> None:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    one_step = actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == config.data.train_batch_size
    if algorithm.beta_anchor_kl and one_step and config.anchor.mode == "on_policy":
        raise ValueError(
            f"algorithm.beta_anchor_kl={algorithm.beta_anchor_kl} has no effect on one optimizer "
            "step an iteration under the on-policy anchor, where the KL and its gradient are 0; "
            "set anchor.mode=fixed, or more steps by ppo_epochs or ppo_mini_batch_size"
        )
    other = {"adpo": GRPO_ONLY, "grpo": ADPO_ONLY}[algorithm.adv_estimator]
    published = _algorithm()
    changed = [f"algorithm.{key}" for key in other if algorithm[key] != _plain(published[key])]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: no effect under adv_estimator={algorithm.adv_estimator}; "
            "leave at the default"
        )


def check_overrides(argv: list[str]) -> None:
    """Checks that every `--config.KEY=...` of a command line names a key.

    Raises:
      ValueError: naming the nearest key there is.
    """
    known = set(_keys(default_config()))
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


def _keys(config: ConfigDict, prefix: str = ""):
    """The dotted names of all keys that hold a value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _require_at_least(config: ConfigDict, minima: dict[str, int]) -> None:
    for key, minimum in minima.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if value < minimum:
            raise ValueError(f"{key} is at least {minimum}, given {value}")


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How an iteration's prompts are cut into optimizer steps and micro-batches.

    Attributes:
      num_prompts: prompts an iteration.
      mini_prompts: prompts an optimizer step.
      micro_prompts: prompts whose completions run through the model at once.
      epochs: passes over the iteration.
    """

    num_prompts: int
    mini_prompts: int
    micro_prompts: int
    epochs: int

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * self.num_prompts // self.mini_prompts

    @property
    def num_micro(self) -> int:
        return self.mini_prompts // self.micro_prompts


def batch_plan(config: ConfigDict, *, num_shards: int) -> BatchPlan:
    """The cut of an iteration over `num_shards` batch shards of the mesh.

    Raises:
      ValueError: when a micro-batch would not hold whole groups, or does not divide the optimizer
        step, or does not spread over the devices; with sizes that would work.
    """
    G = config.algorithm.num_generations
    prompts = config.data.train_batch_size
    mini = config.actor_rollout_ref.actor.ppo_mini_batch_size
    per_device = config.trainer.per_device_train_batch_size
    if mini % num_shards:
        raise ValueError(
            f"an optimizer step of {mini} prompts does not spread over {num_shards} devices "
            "(mesh data x fsdp); make actor.ppo_mini_batch_size a multiple of that number"
        )
    if config.sft.steps and config.sft.batch_size % num_shards:
        raise ValueError(
            f"sft.batch_size ({config.sft.batch_size} rows) does not spread over {num_shards} "
            "devices (mesh data x fsdp); make it a multiple of that number"
        )
    completions = per_device * num_shards if per_device else mini * G
    micro, rest = divmod(completions, G)
    if rest or micro == 0 or mini % micro or micro % num_shards:
        allowed = [
            m * G // num_shards
            for m in range(num_shards, mini + 1, num_shards)
            if mini % m == 0 and m * G % num_shards == 0
        ]
        raise ValueError(
            "trainer.per_device_train_batch_size counts completions a device; times "
            f"{num_shards} devices it must be whole groups of {G} that divide an optimizer step of "
            f"{mini} x {G} = {mini * G} completions. Given {per_device}; these work: {allowed}"
        )
    return BatchPlan(prompts, mini, micro, config.actor_rollout_ref.actor.ppo_epochs)
