"""A run made ready: every mistake that can be found before training is found here.

What each part is made from is next door (`setup`); what happens then, too (`train`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from adpo_jax import checkpoint_files, data, distributed, recording, setup
from adpo_jax import metrics as metrics_lib
from adpo_jax.checkpoint_files import CheckpointError
from adpo_jax.checkpoints import Checkpoints
from adpo_jax.config_checks import finalized
from adpo_jax.filtering import GroupFilter
from adpo_jax.rewards import RewardError
from adpo_jax.rollout import GradedRollout, Prompts, Sampler
from adpo_jax.run_folder import RunFolder
from adpo_jax.setup import Parts
from adpo_jax.update import TrainState

# The completions of an iteration: (step from 0, parameters) -> prompts and graded completions.
Rollouts = Callable[[int, Any], tuple[Prompts, GradedRollout]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that can be started: everything checked, its folder claimed.

    Attributes:
      config: the final one.
      params: what a fresh run starts from; None where there is a checkpoint to go on from, unless
        it lacks frozen parameters.
      rollouts: the sampler and the reward functions, or a recording.
      trackers: the experiment trackers, started.
    """

    config: ConfigDict
    parts: Parts
    folder: RunFolder
    params: Any
    rollouts: Rollouts
    trackers: Sequence[metrics_lib.Writer] = ()

    def save_rollouts(self, step: int, checkpoints: Checkpoints) -> None:
        """Keeps what sampling needs to go on after `step` iterations, where it needs anything."""
        if isinstance(self.rollouts, GroupFilter) and self.folder.writes:
            self.rollouts.save(step, oldest=min(checkpoints.steps, default=0))


def prepare(
    config: ConfigDict,
    workdir: Path,
    *,
    resume: str = "auto",
    allow_config_change: bool = False,
    replay: Path | None = None,
) -> Run:
    """Finds every mistake that can be found before training, then claims the run's folder.

    Args:
      resume: "auto" goes on with the run in the folder where there is one, "never" refuses such a
        folder, "must" any other.
      allow_config_change: resume under a config that changes what the run is.
      replay: a folder of recorded rollouts to train from, in place of a sampler.

    Raises:
      ValueError: nothing has been written then, but for the config where a tracker cannot be
        started.
    """
    options = {
        "replay": replay,
        "resume": resume,
        "allow_config_change": allow_config_change,
    }
    with distributed.fail_together():
        config = finalized(config)
        folder = RunFolder(Path(workdir), writes=distributed.is_leader())
        folder.check(config, **options)
        parts = setup.build(config)
        rollouts = _replayed(config, parts, replay) if replay else _sampled(config, parts, folder)
        checkpoint_files.check(folder.checkpoints, abstract_state(parts))
        if isinstance(rollouts, GroupFilter):
            rollouts.check(max(checkpoint_files.complete_steps(folder.checkpoints), default=0))
        contents = {} if replay else setup.contents(config, parts)  # what is replayed needs neither
    in_checkpoint = folder.has_checkpoint and parts.policy.lora is None
    params = None if in_checkpoint else parts.initial_params()
    with distributed.fail_together():
        folder.claim(config, contents=contents, **options)
        try:
            trackers = setup.make_trackers(config, folder.root)
        except ValueError:
            folder.release()
            raise
    return Run(config, parts, folder, params, rollouts, trackers)


def abstract_state(parts: Parts) -> Callable[[int], TrainState]:
    """What the checkpoint of a step holds: of the cold start where it is below 0."""

    def of_step(step: int) -> TrainState:
        if step < 0 and parts.cold_start is None:
            raise CheckpointError(
                f"checkpoint {step} is of a cold start, which sft.steps=0 leaves out; set it as it "
                "was, or start in another folder"
            )
        return (parts.learner if step >= 0 else parts.cold_start).abstract_state().saved

    return of_step


def _sampled(config, parts: Parts, folder: RunFolder) -> Rollouts:
    """Samples completions of the step's prompts, and grades them."""

    def keep_sample(step: int, error: RewardError):
        folder.write_samples(f"reward_error_{step + 1:06d}", [error.sample or {}])

    def prompts_of(step: int) -> Prompts:
        rows = data.prompt_indices(
            step,
            seed=config.trainer.seed,
            num_rows=len(parts.train_prompts),
            batch_size=config.data.train_batch_size,
        )
        return parts.train_prompts.select(rows)

    def rollouts(step: int, params) -> tuple[Prompts, GradedRollout]:
        prompts = prompts_of(step)
        return prompts, sampler(step, None, prompts, params)

    sampler = Sampler(
        parts.engine,
        parts.sampling,
        parts.tokenizer,
        parts.reward_model,
        seed=config.trainer.seed,
        keep_sample=keep_sample,
        # NaN rewards make an update that is not sound, which is skipped.
        takes_nonfinite=config.trainer.on_bad_update == "skip",
    )
    if not config.algorithm.filter_groups:
        return rollouts
    return GroupFilter(
        sampler,
        prompts_of,
        folder.surplus,
        max_attempts=config.algorithm.filter_max_attempts,
        min_reward_std=config.algorithm.min_reward_std,
    )


def _replayed(config, parts: Parts, replay: Path) -> Rollouts:
    """Reads what another run recorded."""
    recording.check(
        replay,
        range(1, parts.num_steps + 1),
        num_prompts=config.data.train_batch_size,
        num_samples=config.algorithm.num_generations,
        max_tokens=config.data.max_response_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    return lambda step, params: recording.read(replay, step + 1)
