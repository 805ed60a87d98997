"""From the config to the parts that the road is made of.

With `train`, the only module that reads the config: everything built here takes plain arguments.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adpo_jax import arithmetic, data, losses, optimizer, sharding
from adpo_jax.anchor import Anchor
from adpo_jax.config import batch_plan
from adpo_jax.engine import Engine
from adpo_jax.learner import Learner
from adpo_jax.policy import Policy
from adpo_jax.prompts import render_prompts
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rollout import Prompts
from adpo_jax.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
      params: initial parameters.
      val_prompts: None where the config names no evaluation data.
      num_steps: iterations of the whole run.
    """

    policy: Policy
    params: dict
    tokenizer: object
    train_prompts: Prompts
    val_prompts: Prompts | None
    engine: Engine
    sampling: SamplingParams
    reward_model: RewardModel
    learner: Learner
    num_steps: int


def build(config: ConfigDict) -> Parts:
    """Everything the loop needs, cheap checks before expensive work.

    Args:
      config: as `config.finalized` returns it.

    Raises:
      ValueError: for anything in the config that cannot work.
    """
    mesh = sharding.make_mesh(**config.mesh)
    plan = batch_plan(config, num_shards=sharding.BatchSharding(mesh).num_shards)
    algorithm, anchor = make_algorithm(config), Anchor(**config.anchor)
    reward_model = make_reward_model(config)

    tokenizer = load_tokenizer(config)
    train_prompts = load_prompts(config, tokenizer, config.data.train_files, split="train")
    val_prompts = load_val_prompts(config, tokenizer)
    num_steps = num_iterations(config, len(train_prompts))
    adamw, schedule = make_optimizer(config, num_steps * plan.updates_per_iteration)
    policy, params = load_policy(config, mesh)
    _check_vocabulary(tokenizer, policy)
    sampling = make_sampling(config, tokenizer)
    return Parts(
        policy=policy,
        params=params,
        tokenizer=tokenizer,
        train_prompts=train_prompts,
        val_prompts=val_prompts,
        engine=make_engine(config, policy),
        sampling=sampling,
        reward_model=reward_model,
        learner=Learner(
            policy=policy,
            algorithm=algorithm,
            optimizer=adamw,
            schedule=schedule,
            anchor=anchor,
            plan=plan,
            temperature=sampling.temperature,
            seed=config.trainer.seed,
        ),
        num_steps=num_steps,
    )


def num_iterations(config: ConfigDict, num_prompts: int) -> int:
    """Iterations of the whole run over `num_prompts` training prompts."""
    passes = config.trainer.total_epochs * num_prompts / config.data.train_batch_size
    return config.trainer.total_training_steps or math.ceil(passes)


def make_algorithm(config: ConfigDict) -> losses.Adpo | losses.Grpo:
    """The loss that `algorithm.adv_estimator` names, with its parameters."""
    kind = {"adpo": losses.Adpo, "grpo": losses.Grpo}[config.algorithm.adv_estimator]
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in config.algorithm.items() if k in fields})


def make_reward_model(config: ConfigDict) -> RewardModel:
    """The reward functions of the config, in this process or in workers."""
    c = config.custom_reward_function
    kwargs = config.reward_model.reward_kwargs.to_dict()
    functions = [dict(f) for f in config.reward_functions]
    if functions and (c.path or kwargs):
        raise ValueError(
            "reward_functions takes the place of custom_reward_function.path and "
            "reward_model.reward_kwargs; give each function its own path and kwargs there"
        )
    functions = functions or [{"path": c.path, "name": c.name, "kwargs": kwargs}]
    return RewardModel(
        [_reward_function(**f) for f in functions],
        num_workers=c.num_workers,
        timeout_s=c.timeout_s,
        on_timeout=c.on_timeout,
    )


def _reward_function(name: str, path: str = "", weight: float = 1.0, kwargs=None) -> RewardFunction:
    return RewardFunction(path=path or None, name=name, weight=weight, kwargs=dict(kwargs or {}))


def make_optimizer(config: ConfigDict, total_steps: int):
    """(optimizer, schedule) of the policy."""
    c = config.actor_rollout_ref.actor
    schedule = optimizer.make_schedule(
        c.optim.lr,
        warmup_steps=c.optim.lr_warmup_steps,
        total_steps=total_steps,
        kind=c.optim.lr_scheduler_type,
        min_lr_ratio=c.optim.min_lr_ratio,
    )
    b1, b2 = c.optim.betas
    adamw = optimizer.make_optimizer(
        schedule, weight_decay=c.optim.weight_decay, grad_clip=c.grad_clip, b1=b1, b2=b2
    )
    return adamw, schedule


def make_sampling(config: ConfigDict, tokenizer) -> SamplingParams:
    """How the policy is sampled during training."""
    c = config.actor_rollout_ref.rollout
    return SamplingParams(
        n=config.algorithm.num_generations,
        temperature=c.temperature,
        top_p=c.top_p,
        top_k=c.top_k,
        min_p=c.min_p,
        max_tokens=config.data.max_response_length,
        stop_token_ids=stop_token_ids(config.actor_rollout_ref.model.path, tokenizer),
    )


def make_engine(config: ConfigDict, policy: Policy) -> Engine:
    """The rollout engine, shared by training and evaluation."""
    c = config.actor_rollout_ref.rollout
    return Engine(
        policy,
        max_prompt_length=config.data.max_prompt_length,
        max_response_length=config.data.max_response_length,
        num_slots=c.num_slots or None,
        cache_dtype=c.cache_dtype or None,
        attention=c.attention,
        gpu_memory_utilization=c.gpu_memory_utilization,
        group_size=config.algorithm.num_generations,
        free_cache_engine=c.free_cache_engine,
    )


def load_policy(config: ConfigDict, mesh: Mesh) -> tuple[Policy, dict]:
    """The policy and its initial parameters."""
    model = config.actor_rollout_ref.model
    kwargs = {
        "dtype": jnp.bfloat16 if config.trainer.bf16 else jnp.float32,
        "param_dtype": jnp.float32,
        "mesh": mesh,
        "gradient_checkpointing": config.trainer.gradient_checkpointing,
    }
    key = jax.random.key(config.trainer.seed)
    overrides = model.hf_config.to_dict()
    if model.path == arithmetic.NAME:
        return Policy.from_config(arithmetic.MODEL_CONFIG | overrides, key, **kwargs)
    if model.random_init:
        from transformers import AutoConfig

        hf_config = AutoConfig.from_pretrained(model.path).to_dict()
        return Policy.from_config(hf_config | overrides, key, **kwargs)
    if overrides:
        raise ValueError(
            f"model.hf_config changes the architecture ({sorted(overrides)}), so the weights in "
            f"{model.path} no longer fit; set model.random_init=true or leave hf_config empty"
        )
    return Policy.from_pretrained(model.path, **kwargs)


def load_tokenizer(config: ConfigDict):
    """The tokenizer beside the model."""
    path = config.actor_rollout_ref.model.path
    if path == arithmetic.NAME:
        return arithmetic.make_tokenizer()
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ValueError(f"actor_rollout_ref.model.path: there is no folder {path}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def stop_token_ids(path: str, tokenizer) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, and those of generation_config.json."""
    ids = {tokenizer.eos_token_id} - {None}
    if path != arithmetic.NAME:
        from transformers import GenerationConfig

        try:
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # the folder has no generation_config.json
            eos = None
        ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
    if not ids:
        raise ValueError(
            f"the tokenizer of {path} has no end-of-sequence token, so no completion would end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(ids))


def _check_vocabulary(tokenizer, policy: Policy) -> None:
    if len(tokenizer) > policy.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds "
            f"{policy.config.vocab_size}: they do not belong together"
        )


def load_prompts(config: ConfigDict, tokenizer, source: str, *, split: str) -> Prompts:
    """Rows of a source ("train" or "val") as tokenised prompts, with the solution as a column."""
    c = config.data
    if source == arithmetic.NAME:
        dataset = data.Dataset(arithmetic.rows(split))
    else:
        hub_split = {"train": c.train_split, "val": c.val_split}[split]
        dataset = data.load_rows(
            source.split(","), prompt_key=c.prompt_key, answer_key=c.answer_key, split=hub_split
        )
    solutions = [data.extract_solution(answer) for answer in dataset.columns[c.answer_key]]
    return _render(config, tokenizer, dataset.with_column("solution", solutions), split)


def load_val_prompts(config: ConfigDict, tokenizer) -> Prompts | None:
    """The prompts to evaluate on; None where the config names none."""
    if not config.data.val_files:
        return None
    prompts = load_prompts(config, tokenizer, config.data.val_files, split="val")
    limit = config.data.max_val_samples or len(prompts)
    return prompts.select(range(min(limit, len(prompts))))


def load_demonstrations(config: ConfigDict, tokenizer) -> tuple[Prompts, list[list[int]]]:
    """Prompts of the cold start and the completions to imitate, which end with the stop token."""
    c = config.sft
    if c.train_files == arithmetic.NAME:
        dataset = data.Dataset(arithmetic.rows("demonstrations"))
    else:
        dataset = data.load_rows(
            c.train_files.split(","),
            prompt_key=config.data.prompt_key,
            answer_key=c.completion_key,
            split=config.data.train_split,
        )
    prompts = _render(config, tokenizer, dataset, "cold start")
    texts = [str(text) for text in prompts.columns[c.completion_key]]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    completions = [[*ids, tokenizer.eos_token_id] for ids in token_ids]
    fitting = [
        row for row, ids in enumerate(completions) if len(ids) <= config.data.max_response_length
    ]
    if not fitting:
        raise ValueError(
            f"sft.train_files: every completion is longer than data.max_response_length "
            f"({config.data.max_response_length} tokens)"
        )
    return prompts.select(fitting), [completions[row] for row in fitting]


def _render(config: ConfigDict, tokenizer, dataset: data.Dataset, what: str) -> Prompts:
    c = config.data
    rendered = render_prompts(
        dataset,
        tokenizer,
        prompt_key=c.prompt_key,
        prompt_template=c.prompt_template,
        system_prompt=c.system_prompt,
        apply_chat_template=c.apply_chat_template,
        chat_template_kwargs=c.chat_template_kwargs.to_dict(),
        max_prompt_length=c.max_prompt_length,
        overlong=c.overlong_prompts,
    )
    if rendered.num_overlong:
        logging.warning(
            "%s: %d of %d prompts are longer than data.max_prompt_length (%d tokens): %s",
            what,
            rendered.num_overlong,
            len(dataset),
            c.max_prompt_length,
            {"filter": "left out", "truncate": "cut at the front"}[c.overlong_prompts],
        )
    return Prompts(rendered.token_ids, rendered.dataset.columns)


def make_cold_start_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of the supervised stage."""
    schedule = optimizer.make_schedule(
        config.sft.lr,
        warmup_steps=config.sft.lr_warmup_steps,
        total_steps=config.sft.steps,
        kind="cosine",
        min_lr_ratio=0.1,
    )
    b1, b2 = config.sft.betas
    return optimizer.make_optimizer(
        schedule,
        weight_decay=config.sft.weight_decay,
        grad_clip=config.actor_rollout_ref.actor.grad_clip,
        b1=b1,
        b2=b2,
    )
