"""The configuration: every key there is, its default, and what it means.

`configs/*.py` start from `default_config()` and change what they need. The dictionary is locked, so
a misspelt key stops the run and names the nearest one. Units are in the comments; "prompts" count
distinct prompts, "completions" count their samples. What one key allows is checked by whoever uses
it (an algorithm checks its own parameters); `config_checks` checks what only several keys together
can get wrong. An empty string means "not set".
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


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
            "eval": _eval(),
            "sft": _sft(),
            "mesh": _mesh(),
            "trainer": _trainer(),
        }
    )
    return config.lock()


def _algorithm() -> dict:
    return {
        "adv_estimator": "adpo",  # adpo | grpo | rloo
        "num_generations": 8,  # completions a prompt, >= 2
        "tau": 0.8,  # temperature of the anchored policy distribution
        "use_adaptive_tau": True,  # another tau for each prompt
        "adaptive_tau_alpha": 0.5,  # how far it goes; 0 for not at all
        "adaptive_tau_min": 0.05,  # floor of the adapted tau
        "adaptive_tau_mode": "target_entropy",  # target_entropy | policy_entropy
        "adaptive_tau_max": placeholder(float),  # ceiling under policy_entropy; None for no ceiling
        "beta_reward": 0.5,  # temperature of the target distribution
        "scale_rewards": "group",  # group | batch | none (rloo has its own)
        "min_reward_std": 0.0,  # a group whose rewards spread less counts as all equal
        "beta_anchor_kl": 0.0,  # coefficient of the k3 penalty
        "drop_all_failed_prompts": False,  # prompts whose rewards are all <= 0 leave the loss
        # Groups whose rewards are all equal make room for others, sampled from further prompts.
        "filter_groups": False,
        "filter_max_attempts": 4,  # with filter_groups: batches sampled an iteration, at most
        "length_normalize": False,  # divide a completion's log-prob by its number of tokens
        "clip_low": 0.2,  # grpo alone: ratios are clipped at 1 - clip_low
        "clip_high": 0.2,  # grpo alone: and at 1 + clip_high
        "loss_aggregation": "token-mean",  # grpo alone: token-mean | sequence-mean
    }


def _anchor() -> dict:
    return {
        "mode": "on_policy",  # on_policy | fixed | ema | kl_triggered
        "ema_alpha": 0.99,  # weight of the old anchor, each iteration
        "kl_threshold": 0.1,  # nats a token
        "offload": False,  # the kept copy waits in the host's memory between its uses
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
        "val_split": "test",  # of a Hugging Face data set
        "prompt_key": "question",  # column of the prompts
        # Compared with the model's answer, after "####" where there is one; the reward function
        # gets it as `solution`.
        "answer_key": "answer",
        "prompt_template": "{prompt}",  # {prompt} and {any_column} are filled in
        "system_prompt": "",  # "" for none
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
        # Run the Python code in the model's folder that its tokenizer asks for, with all your
        # rights; the model itself never runs any.
        "trust_remote_code": False,
        # LoRA: adapters of this rank are trained beside frozen weights; 0 trains the weights.
        "lora_rank": 0,
        "lora_alpha": 32.0,  # adapters are scaled by lora_alpha / lora_rank
        # "all-linear", or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj.
        "lora_target_modules": "all-linear",
        # Adapters to start from: a folder of peft's or its Hub name, which says the three above.
        "lora_adapter_path": "",
    }


def _actor() -> dict:
    return {
        "optim": {
            "lr": 1e-6,  # peak learning rate of AdamW
            "weight_decay": 0.01,  # not on norms and biases
            "lr_warmup_steps": 0,  # optimizer steps
            "lr_scheduler_type": "constant",  # constant | cosine | linear
            "min_lr_ratio": 0.0,  # where cosine and linear end, as a fraction of lr
            "betas": (0.9, 0.999),  # of AdamW
            "mu_dtype": "float32",  # of AdamW's first moment: float32 | bfloat16
        },
        "optimizer_offload": False,  # its state waits in the host's memory during the rollout
        "grad_clip": 1.0,  # global norm; 0 for none
        "ppo_mini_batch_size": 0,  # prompts an optimizer step; 0 for the whole iteration
        "ppo_epochs": 1,  # passes over an iteration's completions
        # How completions run through the model: packed side by side with one copy of their prompt,
        # or in padded rows, each with its own.
        "layout": "packed",  # packed | rows
        "attention": "auto",  # of the training forward: auto | xla | pallas_tpu | cudnn
    }


def _rollout() -> dict:
    return {
        "temperature": 1.0,  # divides the logits
        "top_p": 1.0,  # keep the fewest tokens with this mass; 1 for all
        "top_k": -1,  # -1 for all tokens
        "min_p": 0.0,  # drop tokens less likely than this share of the likeliest
        # Devices that a copy of the parameters is split over while sampling, within one process; 0
        # for as many as mesh.tensor, up to what a process has.
        "tensor_model_parallel_size": 0,
        # Completions decoded at once, at most; 0 for as many as fit, up to 256 (64 on a CPU).
        "num_slots": 0,
        "cache_dtype": "",  # of keys and values: float32 | bfloat16 | int8; "" for that of compute
        "attention": "auto",  # decode kernel: auto | xla | pallas_tpu | pallas_gpu
        # Give the KV cache back before the update. A batch that shrinks, as on a CPU, always does.
        "free_cache_engine": True,
        "gpu_memory_utilization": 0.85,  # share of the device's memory in use while sampling
    }


def _eval() -> dict:
    return {
        # samples a prompt, besides the greedy answer, for mean@n, pass@k and maj@k; 0 for none
        "n": 0,
        "ks": (),  # the k of pass@k and maj@k, each at most n; () for n alone
        "temperature": 1.0,  # of the samples
        "top_p": 1.0,  # of the samples; 1 keeps all tokens
        "top_k": -1,  # of the samples; -1 keeps all tokens
        "min_p": 0.0,  # of the samples; 0 keeps all tokens
        "max_tokens": 0,  # length limit of an answer; 0 for data.max_response_length
        "graded_by": "accuracy",  # accuracy (good_accuracy) | reward (the run's reward functions)
        "category_key": "",  # the data column to break the scores down by; "" for none
    }


def _sft() -> dict:
    return {
        "steps": 0,  # optimizer steps of supervised training before the first iteration; 0 for none
        "train_files": "",  # as data.train_files; rows with a prompt and a completion
        "completion_key": "completion",  # the column with the text to imitate
        "batch_size": 64,  # rows a step
        "save_freq": 200,  # steps between two checkpoints; 0 for none
        "lr": 1e-3,  # peak; falls along a cosine to a tenth
        "lr_warmup_steps": 20,  # optimizer steps
        "weight_decay": 0.01,  # not on norms and biases
        "betas": (0.9, 0.999),  # of AdamW
    }


def _mesh() -> dict:
    return {
        "data": 1,  # replicas of the parameters
        "fsdp": -1,  # parameters and batch split; -1 for the remaining devices
        "tensor": 1,  # heads, MLP and vocabulary split
    }


def _trainer() -> dict:
    return {
        "project_name": "adpo_jax",  # the run lies in runs/<project_name>/<experiment_name>
        "experiment_name": "default",  # see project_name
        "total_epochs": 1,  # passes over the training prompts
        "total_training_steps": placeholder(int),  # iterations; wins over total_epochs
        "per_device_train_batch_size": 0,  # completions a device holds at once; 0 for all
        "gradient_checkpointing": "none",  # none | full | save_dots; "true" means full
        "bf16": True,  # compute in bfloat16; parameters and optimizer stay float32
        "save_freq": 50,  # iterations; 0 for the end alone
        "save_total_limit": 3,  # checkpoints kept, the newest
        "best_metric": "",  # e.g. eval/accuracy: its largest value is saved at once and kept too
        "max_save_failures": 3,  # failed saves in a row that stop the run
        "grace_period_s": 30.0,  # seconds from SIGTERM or Ctrl-C to the exit
        "on_bad_update": "stop",  # stop | skip: loss, gradient or reward not finite, anchor too far
        "max_bad_updates": 3,  # skipped iterations in a row that stop the run all the same
        "max_anchor_kl": 0.0,  # nats a token; an update beyond it is bad; 0 for no limit
        "rollout_data_dir": "",  # within the run's folder: where every rollout is recorded
        "compilation_cache_dir": "~/.cache/adpo_jax/xla",  # compiled programs; "" for none
        "test_freq": 50,  # iterations; 0 for before and after alone
        # besides metrics.jsonl and TensorBoard: any of wandb, mlflow, trackio, e.g. ("wandb",)
        "logger": (),
        "profile_steps": (),  # first and last iteration of an xprof trace, e.g. (3, 5); () for none
        "log_samples_freq": 10,  # iterations between printed samples; 0 for never
        "log_num_samples": 2,  # samples printed each time
        "seed": 0,  # of weights, order of the prompts and sampling
    }


def keys(config: ConfigDict, prefix: str = ""):
    """The dotted names of all keys that hold a value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
