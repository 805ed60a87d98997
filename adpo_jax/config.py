"""The configuration: every key there is, its default, what it means and what it allows.

`configs/*.py` start from `default_config()` and change what they need. The dictionary is locked, so
a misspelt key stops the run and names what was probably meant. A key is declared once, as a `Key`:
from that come its default, its row in docs/config.md and the refusals of `config_checks`. The
parameters of algorithms are declared by the algorithms (`losses`). In the meanings, "prompts" count
distinct prompts, "completions" count their samples. An empty string means "not set".
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from adpo_jax.losses import ALGORITHMS, parameters


class Need(NamedTuple):
    """What a key has an effect under.

    Attributes:
      text: continues "no effect without".
      is_met: whether it is so under a config.
    """

    text: str
    is_met: Callable[[ConfigDict], Any]


class Key(NamedTuple):
    """One key of the config.

    Attributes:
      default: its value where a config says nothing; None for none.
      meaning: what it is and in which unit, for docs/config.md.
      kind: the type of the values of a key without a default.
      least, most: bounds of a number. Every number is finite.
      above: in place of least, what a number has to be above.
      choices: the values allowed.
      allowed: what is allowed in words, where the bounds and choices do not say it: whoever uses
        the value checks it.
      needs: a key whose value is not the default is refused unless all of them are met. What only
        paces or shapes a stage that a config describes needs no such thing, so that one key
        switches the stage off: test_freq without val_files, and sft.lr with train_files but 0
        steps.
    """

    default: Any
    meaning: str
    kind: type | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    allowed: str = ""
    needs: tuple[Need, ...] = ()

    @property
    def value(self) -> Any:
        """What a fresh config holds."""
        return placeholder(self.kind) if self.kind else self.default

    @property
    def allows(self) -> str:
        """What is allowed, in words; "" where the type says it all."""
        if self.allowed or self.choices:
            return self.allowed or ", ".join(choice or '""' for choice in self.choices)
        return self.bounds

    @property
    def bounds(self) -> str:
        """The bounds of a number, in words; "" where it has none."""
        if self.above is not None:
            return f"above {self.above:g}" + (
                "" if self.most is None else f" and at most {self.most:g}"
            )
        if self.most is not None:
            return f"{self.least:,g} to {self.most:,.10g}"
        return "" if self.least is None else f"at least {self.least:g}"


def default_config() -> ConfigDict:
    """All keys with the published defaults of ADPO where there are any."""
    config = ConfigDict()
    for name, key in declarations().items():
        *sections, last = name.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[last] = key.value
    return config.lock()


def declarations() -> dict[str, Key]:
    """All keys by their dotted names, in the order of the documentation."""
    sections = {
        "algorithm": _algorithm(),
        "anchor": _anchor(),
        "custom_reward_function": _reward_function(),
        "reward_model": {"reward_kwargs": Key({}, REWARD_KWARGS)},
        "": {"reward_functions": Key((), REWARD_FUNCTIONS)},
        "environment": _environment(),
        "data": _data(),
        "actor_rollout_ref.model": _model(),
        "actor_rollout_ref.actor.optim": _optim(),
        "actor_rollout_ref.actor": _actor(),
        "actor_rollout_ref.rollout": _rollout(),
        "actor_rollout_ref.ref": _ref(),
        "teacher": _teacher(),
        "eval": _eval(),
        "sft": _sft(),
        "mesh": _mesh(),
        "trainer": _trainer(),
    }
    return {
        f"{section}.{name}".lstrip("."): key
        for section, keys_of_it in sections.items()
        for name, key in keys_of_it.items()
    }


REWARD_KWARGS = 'short for the "kwargs" of a single function, e.g. {"ngram_size": 4}'
REWARD_FUNCTIONS = (
    "the functions whose weighted rewards add up, each with path, name, weight and kwargs: "
    '({"name": "good_accuracy"}, {"path": "mine.py", "name": "f", "weight": 0.1}); '
    "() for the single one of custom_reward_function.path and name, the short form"
)


def _algorithm() -> dict[str, Key]:
    filtering = Need("algorithm.filter_groups=true", lambda c: c.algorithm.filter_groups)
    common = {
        "adv_estimator": Key("adpo", "the algorithm", choices=tuple(ALGORITHMS)),
        "num_generations": Key(8, "completions a prompt", least=2),
        "filter_groups": Key(
            False,
            "groups whose rewards are all equal make room for others, sampled from further prompts",
        ),
        "filter_max_attempts": Key(
            4, "batches sampled an iteration, at most", least=1, needs=(filtering,)
        ),
    }
    return common | {p.name: _of_algorithms(p) for p in parameters.union(ALGORITHMS.values())}


def _of_algorithms(parameter: parameters.Parameter) -> Key:
    """The key of a parameter; without a default where algorithms have different ones."""
    meaning = parameter.meaning
    without = [name for name in ALGORITHMS if name not in parameter.fields]
    if len(without) > len(parameter.fields):
        meaning += f"; {parameters.listed(parameter.fields)} alone"
    elif without:
        meaning += f"; not under {parameters.listed(without)}"
    return Key(
        parameter.default,
        meaning,
        kind=parameter.kind if parameter.default is None else None,
        allowed=parameter.allowed,
        needs=tuple(_need_of(*other) for other in parameter.needs.items()),
    )


def _need_of(name: str, wanted) -> Need:
    """That a parameter of the algorithm has this value, or the algorithm has none of that name."""

    def is_met(config: ConfigDict) -> bool:
        value = config.algorithm[name]
        if value is None:
            value = getattr(ALGORITHMS[config.algorithm.adv_estimator], name, wanted)
        return value not in parameters.OFF if wanted is parameters.SET else value == wanted

    if wanted is parameters.SET:
        return Need(f"algorithm.{name}", is_met)
    text = str(wanted).lower() if isinstance(wanted, bool) else wanted
    return Need(f"algorithm.{name}={text}", is_met)


def _anchor() -> dict[str, Key]:
    def mode(name: str) -> tuple[Need]:
        return (Need(f"anchor.mode={name}", lambda c: c.anchor.mode == name),)

    kept = Need(
        "an anchor.mode that keeps one", lambda c: c.anchor.mode not in ("on_policy", "sampler")
    )
    return {
        "mode": Key(
            "on_policy",
            "the policy that log-ratios are measured against",
            choices=("on_policy", "sampler", "fixed", "ema", "kl_triggered"),
        ),
        "ema_alpha": Key(
            0.99,
            "weight of the old anchor, each iteration",
            least=0,
            most=1,
            needs=mode("ema"),
        ),
        "kl_threshold": Key(0.1, "nats a token", allowed="above 0", needs=mode("kl_triggered")),
        "offload": Key(
            False, "the kept copy waits in the host's memory between its uses", needs=(kept,)
        ),
    }


def _reward_function() -> dict[str, Key]:
    workers = Need(
        "custom_reward_function.num_workers above 0", lambda c: c.custom_reward_function.num_workers
    )
    alone = Need(
        "its being the only one (reward_functions takes its place)",
        lambda c: not c.reward_functions,
    )
    return {
        "path": Key("", 'short for the "path" of a single function; "" for a built-in one'),
        "name": Key(
            "good_accuracy",
            'short for the "name" of a single function: f(completions, solution, **columns), as in '
            "TRL, or verl's compute_score; \"\" for none but the environment's own reward",
            needs=(alone,),
        ),
        "num_workers": Key(
            0,
            "processes that grade while others decode; 0 grades in this one",
            least=0,
        ),
        "timeout_s": Key(
            10.0,
            "seconds; a completion that takes longer is given up",
            above=0,
            needs=(workers,),
        ),
        "on_timeout": Key(
            "zero",
            "what becomes of a completion that was given up: reward 0, or the run stops",
            choices=("zero", "stop"),
            needs=(workers,),
        ),
    }


_STALE = Need(
    "actor_rollout_ref.rollout.max_staleness above 0",
    lambda c: c.actor_rollout_ref.rollout.max_staleness,
)


def _environment() -> dict[str, Key]:
    there = Need("environment.path", lambda c: c.environment.path)
    external = Need("environment.url", lambda c: c.environment.url)
    return {
        "path": Key(
            "",
            "a Python file with the environment or the tools that the model acts in "
            '(docs/environments.md), "embedded:calculator" or "embedded:guess_number"; "" for '
            "completions of one turn",
        ),
        "name": Key(
            "",
            "in that file: a class as TRL's environment_factory takes it, a function that makes "
            'one, or a dict of either by the data\'s column "environment"; "" for tools alone',
            needs=(there,),
        ),
        "tools": Key(
            (), 'functions in that file that are tools too, e.g. ("search",)', needs=(there,)
        ),
        "max_turns": Key(
            8,
            "turns of the model in a completion, at most; calls in the last are not carried out",
            least=2,
            needs=(there,),
        ),
        "max_tool_tokens": Key(
            256,
            "tokens of a tool's answer; longer ones are cut, with a mark",
            least=1,
            needs=(there,),
        ),
        "timeout_s": Key(
            30.0,
            "seconds for a call of a tool, a reset and a reward; a call that takes longer is "
            "killed, and the model is told",
            above=0,
            needs=(there,),
        ),
        "num_workers": Key(
            4, "processes in which environments live, at least 1", least=1, needs=(there,)
        ),
        "overlap_steps": Key(
            32,
            "with max_staleness above 0, decode steps that other samples do beside a call; then "
            "its answer is taken, and not earlier or later, so that a run does not depend on the "
            "time that tools take",
            least=1,
            needs=(there, _STALE),
        ),
        "url": Key(
            "",
            "in place of path, the address of an environment that runs in processes of its own, "
            "drives this run's engine and answers with token ids (docs/environments.md), e.g. "
            "http://127.0.0.1:9000/rollouts",
        ),
        "serve_host": Key(
            "127.0.0.1",
            "the address of this machine at which that environment reaches the engine",
            needs=(external,),
        ),
        "rollout_timeout_s": Key(
            600.0,
            "seconds for the rollouts of a row there; they are asked for three times at most",
            above=0,
            needs=(external,),
        ),
    }


def _data() -> dict[str, Key]:
    template = Need("data.apply_chat_template=true", lambda c: c.data.apply_chat_template)
    return {
        "train_files": Key(
            "embedded:arithmetic",
            "a .jsonl, .json, .csv or .parquet file (.jsonl.gz and .csv.gz too), a folder of "
            "them, several of either "
            "(comma-separated, or a list as verl's), a Hugging Face data set name, an embedded "
            "one, or "
            'generated tasks: "reasoning_gym:chain_sum?max_terms=3"',
        ),
        "val_files": Key(
            "",
            'as train_files; "" for no evaluation; several sets with scores of their own as '
            '"name=file,other=file"',
        ),
        "train_split": Key("train", _SPLIT),
        "val_split": Key("test", _SPLIT, needs=(_VALIDATION,)),
        "prompt_key": Key(
            "question", 'column of the prompts; it and answer_key may be paths, "extra_info.text"'
        ),
        "answer_key": Key(
            "answer",
            'compared with the answer of the model, after "####" where there is one; the reward '
            "function gets it as `solution`",
        ),
        "prompt_template": Key("{prompt}", "{prompt} and {any_column} are filled in"),
        "system_prompt": Key("", '"" for none', needs=(template,)),
        "apply_chat_template": Key(True, "where the tokenizer has one"),
        "chat_template_kwargs": Key({}, 'e.g. {"enable_thinking": False}', needs=(template,)),
        "allow_control_tokens": Key(
            False,
            "whether control tokens (<|im_end|>) in the data are such, and not text; those of "
            "prompt_template and system_prompt always are",
        ),
        "max_prompt_length": Key(512, "tokens", least=1),
        "overlong_prompts": Key(
            "filter",
            "leave them out, or cut them off at the front",
            choices=("filter", "truncate"),
        ),
        "max_response_length": Key(
            1024,
            "tokens; a run warns where prompt and completion may exceed the model's positions",
            least=1,
        ),
        "mask_truncated_completions": Key(
            False, "completions that ran into max_response_length are not trained on"
        ),
        "skip_special_tokens": Key(
            False,
            "rewards read no special token at all; otherwise those that end, begin or pad a text "
            "are left out alone, and others, such as <answer> where the tokenizer made it one, "
            "stay",
        ),
        "train_batch_size": Key(128, "prompts an iteration", least=1, most=1_000_000),
        "shuffle": Key(True, "a new order each epoch; false for that of the data"),
        "train_max_samples": Key(-1, "train on the first so many rows; -1 for all", least=-1),
        "max_val_samples": Key(
            0,
            "evaluate on the first so many rows of each set; 0 or -1 for all",
            least=-1,
            needs=(_VALIDATION,),
        ),
        "val_max_samples": Key(
            -1,
            "verl's name for max_val_samples, which it comes before; -1 for what that says",
            least=-1,
            needs=(_VALIDATION,),
        ),
        "cache_dir": Key(
            "~/.cache/adpo_jax/data",
            'large files, converted to Arrow; "" for a folder that goes with the process',
        ),
    }


def _model() -> dict[str, Key]:
    return {
        "path": Key(
            "embedded:arithmetic",
            'a folder or Hub name with config.json and safetensors, or "embedded:arithmetic"',
        ),
        "hf_config": Key(
            {},
            "overrides of config.json (of its text_config where there is a vision tower); with "
            "random_init, any size by one line",
        ),
        "override_config": Key(
            {},
            "keys of the model's config.json (of its text_config where there is a vision tower) "
            'with other values, None to leave one out, e.g. {"use_qk_clip": None}; the weights '
            "must still fit",
        ),
        "random_init": Key(False, "start from random weights, not from those in the folder"),
        "trust_remote_code": Key(
            False,
            "run the Python code in the model's folder that its tokenizer asks for, with all your "
            "rights; the model itself never runs any",
        ),
        "lora_rank": Key(
            0,
            "adapters of this rank (LoRA) are trained beside frozen weights; 0 trains the weights",
            least=0,
        ),
        "lora_alpha": Key(32.0, "adapters are scaled by lora_alpha / lora_rank", above=0),
        "lora_target_modules": Key(
            "all-linear",
            '"all-linear", or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj',
        ),
        "lora_adapter_path": Key(
            "",
            "adapters to start from: a folder of peft's or its Hub name, which says the three "
            "above",
        ),
    }


def _optim() -> dict[str, Key]:
    falling = Need(
        "a schedule that falls (actor_rollout_ref.actor.optim.lr_scheduler_type=cosine or linear)",
        lambda c: c.actor_rollout_ref.actor.optim.lr_scheduler_type != "constant",
    )
    return {
        "lr": Key(1e-6, "peak learning rate of AdamW", least=0),
        "weight_decay": Key(0.01, "not on norms and biases", least=0),
        "lr_warmup_steps": Key(0, "optimizer steps, cut to those of the run", least=0),
        "lr_scheduler_type": Key(
            "constant", "of the learning rate", choices=("constant", "cosine", "linear")
        ),
        "min_lr_ratio": Key(
            0.0,
            "where cosine and linear end, as a fraction of lr",
            least=0,
            most=1,
            needs=(falling,),
        ),
        "betas": Key((0.9, 0.999), "of AdamW", allowed=_BETAS),
        "mu_dtype": Key("float32", "of AdamW's first moment", choices=("float32", "bfloat16")),
    }


def _actor() -> dict[str, Key]:
    return {
        "optimizer_offload": Key(False, "its state waits in the host's memory during the rollout"),
        "grad_clip": Key(1.0, "global norm; 0 for none", least=0),
        "ppo_mini_batch_size": Key(
            0,
            "prompts an optimizer step; 0 for the whole iteration",
            least=1,
            allowed="0, or what divides data.train_batch_size",
        ),
        "ppo_epochs": Key(1, "passes over an iteration's completions", least=1),
        "layout": Key(
            "packed",
            "how completions run through the model: packed side by side with one copy of their "
            "prompt, or in padded rows, each with its own",
            choices=("packed", "rows"),
        ),
        "attention": Key(
            "auto",
            "of the training forward",
            allowed="auto, xla, pallas_tpu, pallas_gpu, mosaic_gpu, cudnn",
        ),
        "sequence_exchange": Key(
            "auto",
            "how devices along mesh.sequence see each other's keys and values: all gathered in "
            "every layer, or one share after the other in a ring, which holds a few shares at "
            "once; auto takes the ring where a layer's are 1 GiB or more",
            choices=("auto", "gather", "ring"),
            needs=(
                Need("mesh.sequence above 1", lambda c: c.mesh.sequence != 1),
                _PACKED,
            ),
        ),
        "router_aux_loss_coef": Key(
            0.0,
            "weight of the auxiliary loss that spreads tokens over the experts of a mixture; 0 for "
            "none",
            least=0,
        ),
    }


def _rollout() -> dict[str, Key]:
    in_process = Need(
        "completions that the trainer samples itself (environment.url='')",
        lambda c: not c.environment.url,
    )
    one_turn = Need(
        "completions of one turn (no environment)",
        lambda c: not (c.environment.path or c.environment.url),
    )
    return {
        "temperature": Key(1.0, "divides the logits", above=0, allowed="at least 0.001"),
        "top_p": Key(1.0, "keep the fewest tokens with this mass; 1 for all", above=0, most=1),
        "top_k": Key(-1, "-1 for all tokens", allowed=_TOP_K, least=-1),
        "min_p": Key(
            0.0, "drop tokens less likely than this share of the likeliest", least=0, most=1
        ),
        "tensor_model_parallel_size": Key(
            0,
            "devices that a copy of the parameters is split over while sampling, within one "
            "process; 0 for as many as mesh.tensor, up to what a process has",
            least=0,
        ),
        "num_slots": Key(
            0,
            "completions decoded at once, at most; 0 for as many as fit, up to 256 (64 on a CPU)",
            least=0,
        ),
        "cache_dtype": Key(
            "",
            'of keys and values; "" for that of compute',
            choices=("", "float32", "bfloat16", "int8"),
        ),
        "attention": Key("auto", "decode kernel", allowed="auto, xla, pallas_tpu, pallas_gpu"),
        "free_cache_engine": Key(
            True,
            "give the KV cache back before the update; a batch that shrinks, as on a CPU, always "
            "does",
        ),
        "gpu_memory_utilization": Key(
            0.85, "share of the device's memory in use while sampling", above=0, most=1
        ),
        "expected_response_length": Key(
            0,
            "tokens of a completion that the memory is planned for, where the mean is far below "
            "the limit: more are decoded at once, and where their keys and values need more pages "
            "than there are, the youngest wait and are prefilled again; 0 for memory for "
            "data.max_response_length in each",
            least=0,
            needs=(in_process,),
        ),
        "prefill_chunk_size": Key(
            0,
            "tokens of a piece, a power of two, in which longer prompts are read while others "
            "decode; 0 prefills each prompt at once",
            least=0,
        ),
        "max_staleness": Key(
            0,
            "iterations that a group may begin ahead of the update that trains on it; 0 decodes "
            "each iteration's groups to their end",
            least=0,
        ),
        "ahead": Key(
            0,
            "groups in flight beyond an iteration's; 0 for as many as max_staleness allows",
            allowed="0 to max_staleness times data.train_batch_size",
            least=0,
            needs=(_STALE,),
        ),
        "router_replay": Key(
            False,
            "the update takes prompts and completions through the experts of a mixture that they "
            "went through when they were sampled; k bytes a token and layer, for k experts of a "
            "token",
            needs=(_PACKED, one_turn),
        ),
    }


def _ref() -> dict[str, Key]:
    penalty = Need("algorithm.beta_reference_kl", lambda c: c.algorithm.beta_reference_kl)
    return {
        "path": Key(
            "",
            "the reference: a folder or Hub name of a model with the policy's vocabulary, of any "
            'architecture and size; "" for the policy before the first iteration',
            needs=(penalty,),
        ),
        "override_config": _fixed_override("actor_rollout_ref.ref.path"),
    }


def _teacher() -> dict[str, Key]:
    taught = Need(
        "algorithm.adv_estimator=opd",
        lambda c: ALGORITHMS[c.algorithm.adv_estimator].needs_teacher,
    )
    return {
        "path": Key(
            "",
            "the policy to learn from: a folder or Hub name of a model with the policy's "
            "vocabulary, of any architecture and size",
            needs=(taught,),
        ),
        "override_config": _fixed_override("teacher.path"),
    }


def _fixed_override(path: str) -> Key:
    """The overrides of a model that never moves, at the path of this key."""
    return Key(
        {},
        f"as actor_rollout_ref.model.override_config, for the model of {path}, for which the "
        "policy's overrides do not hold",
        needs=(Need(path, operator.attrgetter(path)),),
    )


def _eval() -> dict[str, Key]:
    sampled = (_VALIDATION, _SAMPLES)
    return {
        "n": Key(
            0,
            "samples a prompt, besides the greedy answer, for mean@n, pass@k and maj@k; 0 for none",
            least=0,
            needs=(_VALIDATION,),
        ),
        "ks": Key((), "the k of pass@k and maj@k, each at most n; () for n alone", needs=sampled),
        "temperature": Key(1.0, "of the samples", least=0, needs=sampled),
        "top_p": Key(1.0, "of the samples; 1 keeps all tokens", above=0, most=1, needs=sampled),
        "top_k": Key(
            -1, "of the samples; -1 keeps all tokens", allowed=_TOP_K, least=-1, needs=sampled
        ),
        "min_p": Key(0.0, "of the samples; 0 keeps all tokens", least=0, most=1, needs=sampled),
        "max_tokens": Key(
            0,
            "length limit of an answer; 0 for data.max_response_length",
            least=0,
            needs=(_VALIDATION,),
        ),
        "graded_by": Key(
            "accuracy",
            "good_accuracy, or the run's reward functions",
            choices=("accuracy", "reward"),
            needs=(_VALIDATION,),
        ),
        "category_key": Key(
            "", 'the data column to break the scores down by; "" for none', needs=(_VALIDATION,)
        ),
    }


def _sft() -> dict[str, Key]:
    needs = (_COLD_START,)
    return {
        "steps": Key(
            0,
            "optimizer steps of supervised training before the first iteration; 0 for none",
            least=0,
        ),
        "train_files": Key("", "as data.train_files; rows with a prompt and a completion"),
        "completion_key": Key("completion", "the column with the text to imitate", needs=needs),
        "train_max_samples": Key(
            -1, "imitate the first so many rows; -1 for all", least=-1, needs=needs
        ),
        "batch_size": Key(64, "rows a step", least=1, needs=needs),
        "save_freq": Key(
            200, "steps between two checkpoints; 0 or -1 for none", least=-1, needs=needs
        ),
        "lr": Key(1e-3, "peak; falls along a cosine to a tenth", least=0, needs=needs),
        "lr_warmup_steps": Key(
            20, "optimizer steps, cut to those of the stage", least=0, needs=needs
        ),
        "weight_decay": Key(0.01, "not on norms and biases", least=0, needs=needs),
        "betas": Key((0.9, 0.999), "of AdamW", allowed=_BETAS, needs=needs),
    }


def _mesh() -> dict[str, Key]:
    return {
        "data": Key(1, "replicas of the parameters"),
        "fsdp": Key(-1, "parameters and batch split; -1 for the remaining devices"),
        "tensor": Key(1, "heads, MLP and vocabulary split"),
        "sequence": Key(
            1,
            "parameters and the tokens of packed streams split, for long completions",
            needs=(_PACKED,),
        ),
        "expert": Key(1, "experts of a mixture and batch split"),
        "dcn_data": Key(
            0,
            "TPU slices or GPU nodes, which replicas alone reach over; 0 for as many as there are, "
            "1 for axes that reach over all of them",
            least=0,
        ),
    }


def _trainer() -> dict[str, Key]:
    total = Need(
        "leaving trainer.total_training_steps out (--config.trainer.total_training_steps=None), "
        "which wins over it",
        lambda c: c.trainer.total_training_steps is None,
    )
    printed = Need("trainer.log_samples_freq above 0", lambda c: c.trainer.log_samples_freq)
    skipping = Need("trainer.on_bad_update=skip", lambda c: c.trainer.on_bad_update == "skip")
    return {
        "project_name": Key("adpo_jax", "the run lies in runs/<project_name>/<experiment_name>"),
        "experiment_name": Key("default", "see project_name"),
        "total_epochs": Key(1, "passes over the training prompts", least=1, needs=(total,)),
        "total_training_steps": Key(None, "iterations; wins over total_epochs", kind=int, least=1),
        "per_device_train_batch_size": Key(
            0,
            "completions held at once by a device, or by those along mesh.tensor and mesh.sequence "
            "together; 0 for all",
            least=0,
        ),
        "gradient_checkpointing": Key(
            "none", '"true" means full', choices=("none", "full", "save_dots", "offload")
        ),
        "scan_layers": Key(
            True,
            "the update's layers are the turns of a loop; False writes them out: faster on a GPU, "
            "and longer to compile",
        ),
        "bf16": Key(True, "compute in bfloat16; what is trained stays float32"),
        "save_freq": Key(
            50,
            "iterations between two checkpoints; 0 for the start and the end alone, -1 for none "
            "but those of trainer.best_metric and of an interruption",
            least=-1,
        ),
        "save_total_limit": Key(3, "checkpoints kept, the newest", least=1),
        "best_metric": Key(
            "", "e.g. eval/accuracy: its largest value is saved at once and kept too"
        ),
        "max_save_failures": Key(3, "failed saves in a row that stop the run", least=1),
        "grace_period_s": Key(30.0, "seconds from SIGTERM or Ctrl-C to the exit", least=0),
        "on_bad_update": Key(
            "stop",
            "what is done where loss, gradient or reward is not finite, or the anchor too far",
            choices=("stop", "skip"),
        ),
        "max_bad_updates": Key(
            3,
            "skipped iterations in a row that stop the run all the same",
            least=1,
            needs=(skipping,),
        ),
        "max_anchor_kl": Key(
            0.0, "nats a token; an update beyond it is bad; 0 for no limit", least=0
        ),
        "rollout_data_dir": Key("", "within the run's folder: where every rollout is recorded"),
        "compilation_cache_dir": Key("~/.cache/adpo_jax/xla", 'compiled programs; "" for none'),
        "test_freq": Key(
            50,
            "iterations between two evaluations; 0 for before and after alone, -1 for none",
            least=-1,
        ),
        "val_before_train": Key(True, "evaluate before the first iteration", needs=(_VALIDATION,)),
        "logger": Key(
            (),
            'besides metrics.jsonl and TensorBoard: wandb, mlflow, trackio, e.g. ("wandb",), '
            "beside verl's console and tensorboard, which are written anyway",
        ),
        "profile_steps": Key(
            (), "first and last iteration of an xprof trace, e.g. (3, 5); () for none"
        ),
        "log_samples_freq": Key(
            10,
            "iterations between samples that are printed and written to samples/; 0 for never",
            least=0,
        ),
        "log_num_samples": Key(2, "samples printed each time", least=0, needs=(printed,)),
        "seed": Key(0, "of weights, order of the prompts and sampling", least=0),
    }


_PACKED = Need(
    "actor_rollout_ref.actor.layout=packed",
    lambda c: c.actor_rollout_ref.actor.layout == "packed",
)
_VALIDATION = Need("data.val_files", lambda c: c.data.val_files)
_SAMPLES = Need("samples (eval.n above 0): the greedy answer has none", lambda c: c.eval.n)
_COLD_START = Need("a cold start (sft.train_files and sft.steps)", lambda c: c.sft.train_files)
_BETAS = "two numbers in [0, 1)"
_TOP_K = "-1, or at least 1"
_SPLIT = "of a Hugging Face data set, or of a folder whose files or folders are named after splits"


def keys(config: ConfigDict, prefix: str = ""):
    """The dotted names of all keys that hold a value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
