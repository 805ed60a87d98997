"""Makes the parts of the road from the config.

Only `run` and what people start (`train`, `main`, `dry_run` and their like) read the config. The
parts that are built here take plain arguments.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adpo_jax import losses
from adpo_jax.devices import sharding
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.log import trackers
from adpo_jax.log.metrics import Writer
from adpo_jax.log.profiling import Profiler
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Prompts
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rollouts.evaluation import EvalSettings
from adpo_jax.run import loading
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.run.checkpoints import Checkpoints
from adpo_jax.run.cold_start import ColdStart
from adpo_jax.run.guard import Guard
from adpo_jax.run.interruption import Interruption
from adpo_jax.run.loading import ModelSource
from adpo_jax.update import optimizer
from adpo_jax.update.anchor import Anchor
from adpo_jax.update.learner import Learner
from adpo_jax.update.plan import BatchPlan


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
      initial_params: reads or makes the parameters that a fresh run starts from.
      cold_start: the supervised stage; None where the config asks for none.
      val_prompts: the prompts to evaluate on; None where the config names no evaluation data.
      eval_reward_model: the reward model that grades the evaluation.
      num_steps: iterations of the whole run.
    """

    policy: Policy
    initial_params: Callable[[], Any]
    tokenizer: object
    cold_start: ColdStart | None
    train_prompts: Prompts
    val_prompts: Prompts | None
    engine: Engine
    sampling: SamplingParams
    reward_model: RewardModel
    eval_settings: EvalSettings
    eval_reward_model: RewardModel
    learner: Learner
    num_steps: int


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parts:
    """Makes everything that the loop needs but the weights; cheap checks come first.

    Args:
      config: as `config_checks.finalized` returns it.
      devices: the devices to train on; None for all there are.

    Raises:
      ValueError: for anything in the config that cannot work.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    plan = batch_plan(config, num_shards=sharding.BatchSharding(mesh).num_shards)
    make_algorithm(config)  # its parameters are checked before any file is read
    trackers.check_installed(config.trainer.logger)
    source = loading.find_model(config)
    policy = loading.make_policy(config, source, mesh)
    sampling = make_sampling(config, source)
    train_prompts = loading.load_prompts(
        config, source.tokenizer, config.data.train_files, split="train"
    )
    val_prompts = loading.load_val_prompts(config, source.tokenizer)
    loading.check_embedded(policy, train_prompts.token_ids, "data.train_files: prompt")
    if val_prompts is not None:
        loading.check_embedded(policy, val_prompts.token_ids, "data.val_files: prompt")
    _check_enough_for_all_processes(config, val_prompts)
    num_steps = num_iterations(config, len(train_prompts))
    make_profiler(config, Path(), num_steps)
    reward_model = make_reward_model(config)
    learner = make_learner(config, policy, plan, num_steps)
    return Parts(
        policy=policy,
        initial_params=lambda: loading.initial_params(config, source, mesh),
        tokenizer=source.tokenizer,
        cold_start=make_cold_start(config, source, learner) if config.sft.steps else None,
        train_prompts=train_prompts,
        val_prompts=val_prompts,
        eval_settings=make_eval_settings(config, source.stop_token_ids),
        eval_reward_model=make_eval_reward_model(config, reward_model),
        engine=make_engine(config, policy, resident_bytes=learner.resident_bytes()),
        sampling=sampling,
        reward_model=reward_model,
        learner=learner,
        num_steps=num_steps,
    )


def contents(config: ConfigDict, parts: Parts) -> dict[str, str]:
    """Digests, in words, of the contents of the files that the config names and training uses.

    The keys are "train_prompts" (token ids and solutions), "demonstrations" (token ids, where there
    is a cold start) and "reward_files" (their bytes, where there are any).
    """
    found = {"train_prompts": _in_words(parts.train_prompts)}
    if parts.cold_start:
        pairs = Prompts(parts.cold_start.prompts, {"solution": parts.cold_start.completions})
        found["demonstrations"] = _in_words(pairs)
    paths = sorted({f.path for f in parts.reward_model.functions if f.path})
    if paths:
        found["reward_files"] = ", ".join(f"{path}: sha256 {_sha256(path)}" for path in paths)
    return found


def _in_words(prompts: Prompts) -> str:
    return f"{len(prompts)} prompts, sha256 {prompts.digest()}"


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_enough_for_all_processes(config: ConfigDict, val_prompts: Prompts | None) -> None:
    wanted, size = jax.process_count(), config.data.train_batch_size
    if size < wanted:
        raise ValueError(
            f"data.train_batch_size is {size} prompts an iteration for {wanted} processes; each "
            f"samples for its own: raise it to {wanted} or more"
        )
    if val_prompts is not None and len(val_prompts) < wanted:
        raise ValueError(
            f"there are {len(val_prompts)} prompts to evaluate on for {wanted} processes; raise "
            "data.max_val_samples or leave data.val_files empty"
        )


def num_iterations(config: ConfigDict, num_prompts: int) -> int:
    """Iterations of the whole run over `num_prompts` training prompts."""
    passes = config.trainer.total_epochs * num_prompts / config.data.train_batch_size
    return config.trainer.total_training_steps or math.ceil(passes)


def make_algorithm(config: ConfigDict) -> losses.Algorithm:
    """The loss that `algorithm.adv_estimator` names, with its parameters."""
    return losses.make_algorithm(config.algorithm.adv_estimator, config.algorithm)


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
        schedule,
        weight_decay=c.optim.weight_decay,
        grad_clip=c.grad_clip,
        b1=b1,
        b2=b2,
        mu_dtype=c.optim.mu_dtype,
    )
    return adamw, schedule


def make_sampling(config: ConfigDict, source: ModelSource) -> SamplingParams:
    """How the policy is sampled during training."""
    c = config.actor_rollout_ref.rollout
    sampling = SamplingParams(
        n=config.algorithm.num_generations,
        temperature=c.temperature,
        top_p=c.top_p,
        top_k=c.top_k,
        min_p=c.min_p,
        max_tokens=config.data.max_response_length,
        stop_token_ids=source.stop_token_ids,
    )
    # The trainer's log-probs are not truncated, so those that they are compared with may not be.
    return dataclasses.replace(sampling, full_log_probs=sampling.method.truncates)


def make_eval_settings(config: ConfigDict, stop_token_ids: tuple[int, ...]) -> EvalSettings:
    """The settings of evaluation."""
    c = config.eval
    sampling = SamplingParams(
        temperature=c.temperature,
        top_p=c.top_p,
        top_k=c.top_k,
        min_p=c.min_p,
        max_tokens=c.max_tokens or config.data.max_response_length,
        stop_token_ids=stop_token_ids,
    )
    ks = tuple(c.ks) or ((c.n,) if c.n else ())
    return EvalSettings(sampling, num_samples=c.n, ks=ks, category_key=c.category_key)


def make_eval_reward_model(config: ConfigDict, reward_model: RewardModel) -> RewardModel:
    """The reward model of evaluation: the run's reward functions, or `good_accuracy` alone."""
    if config.eval.graded_by == "reward":
        return reward_model
    return RewardModel([RewardFunction(name="good_accuracy")])


def make_profiler(config: ConfigDict, folder: Path, num_steps: int) -> Profiler:
    """The profiler that traces the iterations that the config names."""
    return Profiler(folder, config.trainer.profile_steps, num_steps)


def make_trackers(config: ConfigDict, workdir: Path) -> list[Writer]:
    """Starts the experiment trackers of the config; of several processes, the first alone has any.

    Raises:
      ValueError: for one that cannot be started.
    """
    if jax.process_index() > 0:
        return []
    c = config.trainer
    return [trackers.start(name, workdir, c.project_name, c.experiment_name) for name in c.logger]


def make_engine(
    config: ConfigDict, policy: Policy, mesh: Mesh | None = None, *, resident_bytes: int = 0
) -> Engine:
    """The rollout engine, shared by training and evaluation.

    Args:
      mesh: the mesh of one host among those that train; None for this process's part of the
        policy's mesh.
      resident_bytes: bytes of one device that a trainer keeps there while the engine samples.
    """
    c = config.actor_rollout_ref.rollout
    return Engine(
        policy,
        mesh=sharding.rollout_mesh(mesh or policy.mesh, c.tensor_model_parallel_size),
        max_prompt_length=config.data.max_prompt_length,
        max_response_length=max(config.data.max_response_length, config.eval.max_tokens),
        num_slots=c.num_slots or None,
        cache_dtype=c.cache_dtype or None,
        attention=c.attention,
        gpu_memory_utilization=c.gpu_memory_utilization,
        resident_bytes=resident_bytes,
        group_size=config.algorithm.num_generations,
        free_cache_engine=c.free_cache_engine,
    )


def make_checkpoints(config: ConfigDict, folder: Path) -> Checkpoints:
    """The checkpoints of a run, in this folder."""
    c = config.trainer
    return Checkpoints(
        folder,
        save_freq=c.save_freq,
        keep=c.save_total_limit,
        best_metric=c.best_metric,
        max_failures=c.max_save_failures,
    )


def make_guard(config: ConfigDict) -> Guard:
    """The guard that watches the updates."""
    algorithm = make_algorithm(config)
    return Guard(
        config.trainer.on_bad_update,
        config.trainer.max_bad_updates,
        watched=(algorithm.loss_metric, algorithm.anchor_kl_metric, "update/grad_norm"),
    )


def make_interruption(config: ConfigDict) -> Interruption:
    """The object that takes the signals over."""
    return Interruption(config.trainer.grace_period_s)


def make_learner(config: ConfigDict, policy: Policy, plan: BatchPlan, num_steps: int) -> Learner:
    """The learner, which turns scored completions into new parameters."""
    adamw, schedule = make_optimizer(config, num_steps * plan.updates_per_iteration)
    return Learner(
        policy=policy,
        algorithm=make_algorithm(config),
        optimizer=adamw,
        schedule=schedule,
        anchor=Anchor(**config.anchor),
        plan=plan,
        temperature=config.actor_rollout_ref.rollout.temperature,
        seed=config.trainer.seed,
        max_anchor_kl=config.trainer.max_anchor_kl,
        offload_optimizer=config.actor_rollout_ref.actor.optimizer_offload,
    )


def make_cold_start(config: ConfigDict, source: ModelSource, learner: Learner) -> ColdStart:
    """The supervised stage of the config."""
    demonstrations = loading.load_demonstrations(config, source)
    return ColdStart(
        policy=learner.policy,
        optimizer=make_cold_start_optimizer(config),
        prompts=demonstrations.prompts,
        completions=demonstrations.completions,
        num_steps=config.sft.steps,
        batch_size=config.sft.batch_size,
        prompt_length=config.data.max_prompt_length,
        length=config.data.max_response_length,
        seed=config.trainer.seed,
        save_freq=config.sft.save_freq,
        rows_per_micro=config.trainer.per_device_train_batch_size,
    )


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
