"""Prepares a run, and finds every mistake that can be found before training.

`setup` makes the parts of the run; `train` runs it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from adpo_jax.data.order import prompt_indices
from adpo_jax.devices import distributed
from adpo_jax.log import metrics as metrics_lib
from adpo_jax.log.progress import telling
from adpo_jax.records import Prompts
from adpo_jax.rewards import RewardError
from adpo_jax.rollouts.ahead import Ahead
from adpo_jax.rollouts.filtering import GroupFilter, has_spread
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.recording import Replay
from adpo_jax.rollouts.sampler import OnTheSpot, Sampler
from adpo_jax.rollouts.sieve import Sieve
from adpo_jax.rollouts.source import Source, SourceError
from adpo_jax.run import checkpoint_files, setup
from adpo_jax.run.checkpoint_files import CheckpointError
from adpo_jax.run.checkpoints import Checkpoints
from adpo_jax.run.config_checks import finalized
from adpo_jax.run.config_files import user_path
from adpo_jax.run.environments import make_completer
from adpo_jax.run.folder import RunFolder
from adpo_jax.run.setup import Parts
from adpo_jax.update import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can be started: everything has been checked, its folder is claimed.

    Attributes:
      config: the final config.
      params: the parameters that a fresh run starts from; None where there is a checkpoint to go on
        from that has all of them (under LoRA it lacks the frozen ones).
      source: the source of each iteration's groups.
      fixed_params: the parameters of reference and teacher, where they come from folders, else
        None.
      trackers: the experiment trackers, which have been started.
    """

    config: ConfigDict
    parts: Parts
    folder: RunFolder
    params: Any
    source: Source
    trackers: Sequence[metrics_lib.Writer] = ()
    fixed_params: Any = None

    def save_source(self, step: int, checkpoints: Checkpoints) -> None:
        """Saves the state that the source needs to go on after `step` iterations."""
        if self.folder.writes or self.source.saves_on_every_process:
            self.source.save(step, kept=checkpoints.steps)


class ForSamplers(NamedTuple):
    """Where samplers in other processes find a run.

    Attributes:
      address: host and port.
      key: the key that they know.
      weights: the folder in which they find the weights; "" where the trainer sends them.
    """

    address: tuple[str, int]
    key: str
    weights: str = ""


def prepare(
    config: ConfigDict,
    workdir: str | Path | None = None,
    *,
    build: Callable[[ConfigDict], Parts] = setup.build,
    resume: str = "auto",
    allow_config_change: bool = False,
    replay: str | Path | None = None,
    samplers: ForSamplers | None = None,
) -> Run:
    """Finds every mistake that can be found before training, then claims the run's folder.

    Args:
      workdir: the run's folder; None for `default_workdir`.
      build: makes the parts of the run from the final config: `setup.build`, or a function that
        replaces some of its parts by others.
      resume: "auto" goes on with the run in the folder where there is one, "never" refuses a folder
        with a run, "must" refuses a folder without one.
      allow_config_change: whether to resume under a config that changes what the run is.
      replay: a folder of recorded rollouts to train from, in place of a sampler.
      samplers: where samplers in other processes find this run; None to sample here.

    Raises:
      ValueError: for every such mistake. Nothing has been written then, except for the config where
        a tracker cannot be started.
    """
    workdir = default_workdir(config) if workdir is None else user_path(workdir)
    replay = None if replay is None else user_path(replay)
    options = {
        "replay": replay,
        "resume": resume,
        "allow_config_change": allow_config_change,
    }
    with contextlib.ExitStack() as owned:
        with distributed.fail_together():
            config = finalized(config)
            if replay and samplers:
                raise ValueError("--replay trains from recordings, and needs no --role=trainer")
            folder = RunFolder(workdir, writes=distributed.is_leader())
            folder.check(config, **options)
            with telling("reading the model's config, its tokenizer and the data"):
                parts = owned.enter_context(build(config))
            if replay:
                source = _replayed(config, parts, replay)
            else:
                source = _sampled(config, parts, folder, samplers)
            owned.callback(source.close)
            checkpoint_files.check(folder.checkpoints, state_shapes_of(parts))
            step = max(checkpoint_files.complete_steps(folder.checkpoints), default=0)
            source.check(step)
            if not replay:
                _check_that_nothing_is_left(config, folder, step)
            # A replay uses no such files.
            contents = {} if replay else setup.contents(config, parts)
        in_checkpoint = folder.has_checkpoint and parts.policy.lora is None
        with telling("reading or making the weights"):
            params = None if in_checkpoint else parts.initial_params()
            fixed_params = {name: other.load() for name, other in parts.fixed.items()} or None
        with distributed.fail_together():
            folder.claim(config, contents=contents, **options)
            owned.enter_context(folder)
            trackers = setup.make_trackers(config, folder.root)
        owned.pop_all()  # nothing failed
    return Run(config, parts, folder, params, source, trackers, fixed_params)


def _check_that_nothing_is_left(config, folder: RunFolder, step: int) -> None:
    """Checks that iteration `step` left no samples that this config does not take up.

    Raises:
      SourceError: where it did: they would be lost, and others of their prompts trained on twice.
    """
    staleness = "actor_rollout_ref.rollout.max_staleness"
    filtering = "algorithm.filter_groups"
    ahead = config.actor_rollout_ref.rollout.max_staleness
    taken_up = {
        (folder.in_flight, f"{staleness}=0"): ahead,
        (folder.surplus, f"{filtering}=False"): config.algorithm.filter_groups and not ahead,
    }
    for (states, setting), is_taken_up in taken_up.items():
        left = [] if is_taken_up else sorted(states.glob(f"{step:06d}.*"))
        if left:
            raise SourceError(
                f"{setting} goes on from iteration {step} without the samples that it left in "
                f"{left[0]}: they would be lost, and their prompts be drawn again or never. Set "
                f"{staleness} and {filtering} as they were, or start again in another folder"
            )


def default_workdir(config: ConfigDict) -> Path:
    """The folder of a run that names none.

    Raises:
      ValueError: where a link leads out of `runs/`.
    """
    runs = Path("runs")
    folder = runs / config.trainer.project_name / config.trainer.experiment_name
    if not folder.resolve().is_relative_to(runs.resolve()):
        raise ValueError(
            f"trainer.project_name and trainer.experiment_name give the folder {folder}, which "
            f"leads out of {runs}/ to {folder.resolve()}; give a --workdir"
        )
    return folder


def state_shapes_of(parts: Parts) -> Callable[[int], TrainState]:
    """From a step to the shapes of its checkpoint's state; steps below 0 are of the cold start."""

    def of_step(step: int) -> TrainState:
        if step < 0 and parts.cold_start is None:
            raise CheckpointError(
                f"checkpoint {step} is of a cold start, which sft.steps=0 leaves out; set it as it "
                "was, or start in another folder"
            )
        return (parts.learner if step >= 0 else parts.cold_start).abstract_state().saved

    return of_step


def _sampled(
    config, parts: Parts, folder: RunFolder, samplers: ForSamplers | None = None
) -> Source:
    """The source that samples completions of the step's prompts, and grades them."""

    def keep_sample(step: int, error: RewardError):
        folder.write_samples(f"reward_error_{step + 1:06d}", [error.sample or {}])

    def prompts_of(step: int) -> Prompts:
        rows = prompt_indices(
            step,
            seed=config.trainer.seed,
            num_rows=len(parts.train_prompts),
            batch_size=config.data.train_batch_size,
            shuffle=config.data.shuffle,
        )
        return parts.train_prompts.select(rows)

    reading = setup.make_reading(config, parts.sampling.stop_token_ids)
    completer = make_completer(parts.engine, parts.tokenizer, reading, parts.environments)
    sampler = Sampler(
        parts.engine,
        parts.sampling,
        parts.tokenizer,
        parts.reward_model,
        seed=config.trainer.seed,
        keep_sample=keep_sample,
        # An update with NaN rewards is not sound, and is skipped.
        takes_nonfinite=config.trainer.on_bad_update == "skip",
        reading=reading,
        num_steps=parts.num_steps,
        completer=completer,
    )
    rollout = config.actor_rollout_ref.rollout
    most = rollout.max_staleness * config.data.train_batch_size
    pacing = Pacing(
        config.data.train_batch_size, rollout.max_staleness, rollout.ahead or most, parts.num_steps
    )
    if samplers is not None:
        return _elsewhere(config, parts, folder, samplers, sampler, prompts_of, pacing)
    if rollout.max_staleness:
        in_turns = completer if isinstance(completer, InTurns) else None
        return Ahead(
            sampler,
            prompts_of,
            folder.in_flight,
            pacing,
            sieve=_sieve(config),
            in_turns=in_turns,
        )
    if not config.algorithm.filter_groups:
        return OnTheSpot(sampler, prompts_of)
    return GroupFilter(sampler, prompts_of, folder.surplus, **_filtering(config, parts))


def _filtering(config, parts: Parts) -> dict[str, Any]:
    """What `GroupFilter` goes by."""
    c = config.algorithm
    return {
        "num_generations": c.num_generations,
        "full_log_probs": parts.sampling.full_log_probs,
        "max_attempts": c.filter_max_attempts,
        "min_reward_std": c.min_reward_std,
    }


def _sieve(config) -> Sieve | None:
    """Which groups that are sampled ahead are trained on; None for all."""
    c = config.algorithm
    if not c.filter_groups or not config.actor_rollout_ref.rollout.max_staleness:
        return None
    spread = functools.partial(has_spread, min_reward_std=c.min_reward_std)
    return Sieve(spread, (c.filter_max_attempts - 1) * config.data.train_batch_size)


def _elsewhere(
    config,
    parts: Parts,
    folder: RunFolder,
    samplers: ForSamplers,
    sampler: Sampler,
    prompts_of: Callable[[int], Prompts],
    pacing: Pacing,
) -> Source:
    """The source whose groups samplers in other processes decode.

    Raises:
      ValueError: for settings that do not go with that.
    """
    others = {
        "environment.path": config.environment.path,
        "environment.url": config.environment.url,
    }
    for other in (name for name, is_set in others.items() if is_set):
        raise ValueError(f"--role=trainer does not go with {other}: set it back, or sample here")
    # These need what [serve] installs.
    from adpo_jax.rollouts.elsewhere import FilteredBatches, RemoteBatches
    from adpo_jax.rollouts.elsewhere_ahead import RemoteAhead
    from adpo_jax.run import roles

    given = (sampler, prompts_of, folder.in_flight)
    settings = {
        "fits": roles.fits_of(parts.policy, parts.engine, parts.sampling),
        "fits_of_params": functools.partial(roles.fits_of_params, parts.engine.verbs),
        "weights_of": functools.partial(roles.sent_weights, parts.engine.verbs),
        "address": samplers.address,
        "key": samplers.key,
        "weights_folder": samplers.weights,
    }
    if pacing.max_staleness:
        return RemoteAhead(*given, pacing, **settings, sieve=_sieve(config))
    batches = RemoteBatches(*given, **settings, batch_size=pacing.batch_size)
    if not config.algorithm.filter_groups:
        return batches
    return FilteredBatches(batches, prompts_of, folder.surplus, **_filtering(config, parts))


def _replayed(config, parts: Parts, replay: Path) -> Source:
    """The source that reads the recordings of another run."""
    model = parts.policy.config
    router_replay = config.actor_rollout_ref.rollout.router_replay
    return Replay(
        replay,
        parts.num_steps,
        num_prompts=config.data.train_batch_size,
        num_samples=config.algorithm.num_generations,
        max_response_length=config.data.max_response_length,
        max_prompt_length=config.data.max_prompt_length,
        prompt_key=config.data.prompt_key,
        vocab_size=model.vocab_size,
        experts=(model.num_mixtures, model.mixture.chosen) if router_replay else None,
        rewards=parts.reward_model.names if parts.learner.algorithm.decouples_rewards else (),
    )
