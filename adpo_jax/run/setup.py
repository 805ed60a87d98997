"""Makes the parts of the road from the config.

Only `run` and what people start (`train`, `main`, `dry_run` and their like) read the config. The
parts that are built here take plain arguments.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adpo_jax import losses
from adpo_jax.devices import sharding
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.environments.contract import EMBEDDED
from adpo_jax.log import trackers
from adpo_jax.log.metrics import Writer
from adpo_jax.log.profiling import Profiler
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Prompts
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rewards.binding import OFFERED_IN_TURNS
from adpo_jax.rollouts.completing import Reading
from adpo_jax.rollouts.evaluation import EvalSettings
from adpo_jax.rollouts.silence import SilenceWatch
from adpo_jax.run import config_checks, datasets, loading
from adpo_jax.run.batch_plan import batch_plan
from adpo_jax.run.checkpoints import Checkpoints
from adpo_jax.run.cold_start import ColdStart
from adpo_jax.run.environments import (
    AnyEnvironments,
    check_environments,
    make_environments,
    shown_tools,
)
from adpo_jax.run.guard import Guard
from adpo_jax.run.identity import ADAPTERS
from adpo_jax.run.interruption import Interruption
from adpo_jax.run.loading import FixedPolicy, ModelSource
from adpo_jax.run.reward_functions import reward_functions
from adpo_jax.run.whole_keys import section, whole_keys
from adpo_jax.update import optimizer
from adpo_jax.update.anchor import Anchor
from adpo_jax.update.learner import Learner
from adpo_jax.update.plan import BatchPlan

# Tokens between two looks of the host where requests come and go.
EXTERNAL_STEPS = 8

# The settings of sampling that have a key each, by the names that training and evaluation share.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run; leaving it as a context ends the processes of rewards and environments.

    Attributes:
      initial_params: reads or makes the parameters that a fresh run starts from.
      cold_start: the supervised stage; None where the config asks for none.
      val_prompts: the prompts to evaluate on; None where the config names no evaluation data.
      eval_reward_model: the reward model that grades the evaluation.
      num_steps: iterations of the whole run.
      environments: what the model acts in; None for completions of one turn.
      fixed: the reference and the teacher, where they come from folders.
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
    environments: AnyEnvironments | None = None
    fixed: Mapping[str, FixedPolicy] = dataclasses.field(default_factory=dict)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        with contextlib.ExitStack() as owned:
            owned.push(self.reward_model)
            if self.environments is not None:
                owned.push(self.environments)


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Parts:
    """Makes everything that the loop needs but the weights; cheap checks come first.

    Args:
      config: as `config_checks.finalized` returns it.
      devices: the devices to train on; None for all there are.

    Raises:
      ValueError: for anything in the config that cannot work.
    """
    models = _models(config, devices)
    source, policy = models.source, models.policy
    environments = make_environments(config, source.tokenizer, source.stop_token_ids)
    with contextlib.ExitStack() as owned:
        if environments is not None:
            owned.enter_context(environments)
        tools = shown_tools(environments)
        train_prompts, val_prompts = _prompts(config, models, environments, tools)
        num_steps = num_iterations(config, len(train_prompts))
        make_profiler(config, Path(), num_steps)  # refuses steps that the run does not have
        reward_model = owned.enter_context(make_reward_model(config, environments))
        check_rewards(config, reward_model, train_prompts, val_prompts)
        policies = {name: found.policy for name, found in models.fixed.items()}
        learner = make_learner(config, policy, models.plan, num_steps, fixed=policies)
        cold_start = make_cold_start(config, source, learner, tools) if config.sft.steps else None
        parts = Parts(
            policy=policy,
            initial_params=lambda: loading.initial_params(config, source, policy.mesh),
            tokenizer=source.tokenizer,
            cold_start=cold_start,
            train_prompts=train_prompts,
            val_prompts=val_prompts,
            eval_settings=make_eval_settings(config, source.stop_token_ids),
            eval_reward_model=make_eval_reward_model(config, reward_model),
            engine=make_engine(config, policy, resident_bytes=learner.resident_bytes()),
            sampling=models.sampling,
            reward_model=reward_model,
            learner=learner,
            num_steps=num_steps,
            environments=environments,
            fixed=models.fixed,
        )
        owned.pop_all()  # nothing failed
    return parts


class _Models(NamedTuple):
    """The policy and the fixed models beside it, without weights, and how they are used."""

    source: ModelSource
    policy: Policy
    fixed: Mapping[str, FixedPolicy]
    plan: BatchPlan
    sampling: SamplingParams


def _models(config: ConfigDict, devices: Sequence[jax.Device] | None) -> _Models:
    mesh = make_mesh(config, devices)
    plan = batch_plan(config, num_shards=sharding.BatchSharding(mesh).num_shards)
    config_checks.make_algorithm(config)  # its parameters are checked before any file is read
    trackers.check_installed(config.trainer.logger)
    source = loading.find_model(config)
    policy = loading.make_policy(config, source, mesh)
    fixed = loading.find_fixed(config, source, mesh)
    return _Models(source, policy, fixed, plan, make_sampling(config, source))


def _prompts(
    config: ConfigDict, models: _Models, environments: AnyEnvironments | None, tools: Any
) -> tuple[Prompts, Prompts | None]:
    """The prompts to train and to evaluate on, checked; None for no evaluation.

    Args:
      tools: as `shown_tools` returns them.
    """
    tokenizer = models.source.tokenizer
    train_prompts = datasets.load_prompts(
        config, tokenizer, config.data.train_files, split="train", tools=tools
    )
    val_prompts = datasets.load_val_prompts(config, tokenizer, tools)
    data = {"data.train_files": train_prompts, "data.val_files": val_prompts}
    for option, prompts in data.items():
        # Prompts that are tokenised when they are due are checked by the engine.
        if prompts is not None and isinstance(prompts.token_ids, list):
            loading.check_embedded(models.policy, prompts.token_ids, f"{option}: prompt")
    check_environments(config, environments, data)
    _check_enough_for_all_processes(config, val_prompts)
    return train_prompts, val_prompts


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the devices to train on; None for all there are."""
    with whole_keys(section("mesh", config.mesh)):
        return sharding.make_mesh(**config.mesh, devices=devices)


def contents(config: ConfigDict, parts: Parts) -> dict[str, str]:
    """Digests, in words, of the contents of the files that the config names and training uses.

    The keys are "train_prompts" (token ids and solutions), "demonstrations" (token ids, where there
    is a cold start), "reward_files" and "environment_file" (their bytes, where there are any), and
    "reference_weights" and "teacher_weights", where they come from folders. "adapters" are rank,
    alpha and targets of those that come from a folder, as JSON. "frequencies" says which of the two
    sets of a model with LongRoPE serves the run.
    """
    found = {"train_prompts": _in_words(parts.train_prompts)}
    if parts.cold_start:
        pairs = Prompts(parts.cold_start.prompts, {"solution": parts.cold_start.completions})
        found["demonstrations"] = _in_words(pairs)
    paths = sorted({f.path for f in parts.reward_model.functions if f.path})
    if paths:
        found["reward_files"] = ", ".join(f"{path}: sha256 {_sha256(path)}" for path in paths)
    if config.actor_rollout_ref.model.lora_adapter_path:
        lora = dataclasses.asdict(parts.policy.lora)
        found[ADAPTERS] = json.dumps(lora | {"targets": ",".join(lora["targets"])})
    if any(rope.kind == "longrope" for rope in parts.policy.config.ropes):
        short = parts.policy.for_length(1).config.ropes
        which = "within" if parts.policy.config.ropes == short else "beyond"
        found["frequencies"] = f"of sequences {which} the model's original length"
    path = config.environment.path
    if path and path not in EMBEDDED:
        found["environment_file"] = f"{path}: sha256 {_sha256(path)}"
    return found | {f"{name}_weights": other.digest() for name, other in parts.fixed.items()}


def _in_words(prompts: Prompts) -> str:
    of_files = "of files " if prompts.files_digest else ""
    return f"{len(prompts)} prompts, sha256 {of_files}{prompts.digest()}"


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


def make_reward_model(
    config: ConfigDict, environments: AnyEnvironments | None = None
) -> RewardModel:
    """The reward functions of the config, in this process or in workers.

    Args:
      environments: their own rewards are added.
    """
    c = config.custom_reward_function
    names = ("num_workers", "timeout_s", "on_timeout")
    with whole_keys(section("custom_reward_function", names)):
        return RewardModel(
            reward_functions(config),
            num_workers=c.num_workers,
            timeout_s=c.timeout_s,
            on_timeout=c.on_timeout,
            given=environments.rewards if environments else (),
        )


def check_rewards(
    config: ConfigDict,
    reward_model: RewardModel,
    train_prompts: Prompts | None,
    val_prompts: Prompts | None,
) -> None:
    """Checks that the reward functions can grade the data, before anything is sampled.

    Raises:
      ValueError: naming the column that is missing, and those that there are.
    """
    in_turns = config.environment.path or config.environment.url
    offered = OFFERED_IN_TURNS if in_turns else ()
    if train_prompts is not None:
        reward_model.check_columns([*train_prompts.columns, *offered], "data.train_files")
    if val_prompts is not None and config.eval.graded_by == "reward":
        reward_model.check_columns([*val_prompts.columns, *offered], "data.val_files")


def make_reading(config: ConfigDict, stop_token_ids: tuple[int, ...]) -> Reading:
    """How completions are read for the rewards."""
    c = config.data
    return Reading(c.prompt_key, c.skip_special_tokens, tuple(stop_token_ids))


def make_optimizer(config: ConfigDict, total_steps: int):
    """(optimizer, schedule) of the policy."""
    c = config.actor_rollout_ref.actor
    schedule = optimizer.make_schedule(
        c.optim.lr,
        warmup_steps=_warmup("actor_rollout_ref.actor.optim", c.optim.lr_warmup_steps, total_steps),
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


def _warmup(where: str, wanted: int, total_steps: int) -> int:
    """Steps of the warm-up, cut to those that there are."""
    if wanted > total_steps:
        print(
            f"WARNING: {where}.lr_warmup_steps is {wanted}, but there are {total_steps} optimizer "
            f"steps; the warm-up is cut to {total_steps}, and {where}.lr is reached at the end",
            file=sys.stderr,
            flush=True,
        )
    return min(wanted, total_steps)


def make_sampling(config: ConfigDict, source: ModelSource) -> SamplingParams:
    """How the policy is sampled during training."""
    c = config.actor_rollout_ref.rollout
    with whole_keys(section("actor_rollout_ref.rollout", _SAMPLING)):
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
    return dataclasses.replace(
        sampling,
        full_log_probs=sampling.method.truncates,
        routed_experts=c.router_replay,
        prompt_experts=c.router_replay,
    )


def make_eval_settings(config: ConfigDict, stop_token_ids: tuple[int, ...]) -> EvalSettings:
    """The settings of evaluation."""
    c = config.eval
    with whole_keys(section("eval", _SAMPLING)):
        sampling = SamplingParams(
            temperature=c.temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            min_p=c.min_p,
            max_tokens=c.max_tokens or config.data.max_response_length,
            stop_token_ids=stop_token_ids,
        )
    ks = tuple(c.ks) or ((c.n,) if c.n else ())
    names = datasets.named_sources(config.data.val_files)
    return EvalSettings(
        sampling,
        num_samples=c.n,
        ks=ks,
        category_key=c.category_key,
        reading=make_reading(config, stop_token_ids),
        set_key=datasets.VAL_SET if names and "" not in names else "",
    )


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
    names = ("num_slots", "cache_dtype", "attention", "gpu_memory_utilization")
    names += ("expected_response_length", "prefill_chunk_size")
    lengths = ("max_prompt_length", "max_response_length")
    if c.router_replay and not policy.config.mixture:
        raise ValueError(
            "actor_rollout_ref.rollout.router_replay repeats the choice of experts, and the model "
            "has none; leave it false"
        )
    response = max(config.data.max_response_length, config.eval.max_tokens)
    # An external environment sends the whole conversation as the prompt of each turn.
    earlier = response if config.environment.url else 0
    with whole_keys(section("actor_rollout_ref.rollout", names), section("data", lengths)):
        return Engine(
            policy,
            mesh=sharding.rollout_mesh(mesh or policy.mesh, c.tensor_model_parallel_size),
            max_prompt_length=config.data.max_prompt_length + earlier,
            max_response_length=response,
            num_slots=c.num_slots or None,
            cache_dtype=c.cache_dtype or None,
            attention=c.attention,
            gpu_memory_utilization=c.gpu_memory_utilization,
            resident_bytes=resident_bytes,
            group_size=config.algorithm.num_generations,
            expected_response_length=c.expected_response_length or None,
            prefill_chunk_size=c.prefill_chunk_size,
            free_cache_engine=c.free_cache_engine,
            **({"steps_per_dispatch": EXTERNAL_STEPS} if config.environment.url else {}),
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


def make_guard(config: ConfigDict, algorithm: losses.Algorithm) -> Guard:
    """The guard that watches the updates of this algorithm."""
    return Guard(
        config.trainer.on_bad_update,
        config.trainer.max_bad_updates,
        watched=(algorithm.loss_metric, algorithm.anchor_kl_metric, "update/grad_norm"),
    )


def make_silence_watch(config: ConfigDict, algorithm: losses.Algorithm) -> SilenceWatch:
    """The watch that notices when rewards teach the policy to say less and less."""
    return SilenceWatch(
        min_reward_std=config.algorithm.min_reward_std,
        # Without a part in the loss, rewards teach nobody to be brief.
        is_off=config.algorithm.drop_all_failed_prompts or algorithm.needs_teacher,
    )


def make_interruption(config: ConfigDict) -> Interruption:
    """The object that takes the signals over."""
    return Interruption(config.trainer.grace_period_s)


def make_learner(
    config: ConfigDict,
    policy: Policy,
    plan: BatchPlan,
    num_steps: int,
    *,
    fixed: Mapping[str, Policy] | None = None,
) -> Learner:
    """The learner, which turns scored completions into new parameters.

    Args:
      fixed: the policies of reference and teacher, where they come from folders.
    """
    actor = config.actor_rollout_ref.actor
    if actor.router_aux_loss_coef and not policy.config.mixture:
        raise ValueError(
            "actor_rollout_ref.actor.router_aux_loss_coef spreads tokens over the experts of a "
            "mixture, and the model has none; leave it 0"
        )
    adamw, schedule = make_optimizer(config, num_steps * plan.updates_per_iteration)
    return Learner(
        policy=policy,
        algorithm=config_checks.make_algorithm(config),
        optimizer=adamw,
        schedule=schedule,
        anchor=Anchor(**config.anchor),
        plan=plan,
        temperature=config.actor_rollout_ref.rollout.temperature,
        seed=config.trainer.seed,
        max_anchor_kl=config.trainer.max_anchor_kl,
        offload_optimizer=config.actor_rollout_ref.actor.optimizer_offload,
        fixed=fixed or {},
        router_aux_loss_coef=actor.router_aux_loss_coef,
    )


def make_cold_start(
    config: ConfigDict, source: ModelSource, learner: Learner, tools: Mapping | None = None
) -> ColdStart:
    """The supervised stage of the config.

    Args:
      tools: what prompts show of tools, as of `render_prompts`.
    """
    demonstrations = datasets.load_demonstrations(config, source, tools)
    for what in ("prompt", "completion"):
        rows = getattr(demonstrations, f"{what}s")
        loading.check_embedded(learner.policy, rows, f"sft.train_files: {what}")
    return ColdStart(
        policy=learner.policy,
        optimizer=make_cold_start_optimizer(config),
        prompts=demonstrations.prompts,
        completions=demonstrations.completions,
        num_steps=config.sft.steps,
        batch_size=config.sft.batch_size,
        prompt_length=config.data.max_prompt_length,
        completion_length=config.data.max_response_length,
        seed=config.trainer.seed,
        save_freq=config.sft.save_freq,
        rows_per_micro=config.trainer.per_device_train_batch_size,
        layout=config.actor_rollout_ref.actor.layout,
    )


def make_cold_start_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of the supervised stage."""
    schedule = optimizer.make_schedule(
        config.sft.lr,
        warmup_steps=_warmup("sft", config.sft.lr_warmup_steps, config.sft.steps),
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
