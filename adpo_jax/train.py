"""The road: prompts -> rollout -> rewards -> anchor log-probs -> loss -> update -> metrics,
checkpoint, evaluation.

    import adpo_jax
    adpo_jax.train(config, callbacks=[lambda iteration: print(iteration.metrics["reward/mean"])])

`run.setup` makes the parts from a config, `run.preparation` checks them before anything starts, and
`update.learner` does the forwards and optimizer steps of an iteration.
"""

import contextlib
import functools
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from adpo_jax.devices import distributed, host_memory
from adpo_jax.environments.pool import EnvironmentFailed
from adpo_jax.log import metrics as metrics_lib
from adpo_jax.log import profiling
from adpo_jax.log.printable import say
from adpo_jax.log.progress import Progress, telling
from adpo_jax.model import lora
from adpo_jax.policy import adapters
from adpo_jax.records import GradedGroups
from adpo_jax.rewards import RewardError, TrainerState
from adpo_jax.rollouts import recording
from adpo_jax.rollouts.evaluation import evaluate
from adpo_jax.rollouts.flight import with_ages_anew
from adpo_jax.rollouts.sampler import (
    reward_metrics,
    rollout_metrics,
    sample_records,
    sample_table,
)
from adpo_jax.rollouts.source import SourceError
from adpo_jax.run import digests, setup
from adpo_jax.run.checkpoint_files import CheckpointError
from adpo_jax.run.checkpoints import Checkpoints, Restored, SaveError
from adpo_jax.run.environments import make_completer
from adpo_jax.run.folder import RunFolder
from adpo_jax.run.guard import Guard
from adpo_jax.run.interruption import Interrupted, Interruption
from adpo_jax.run.preparation import Run, prepare, state_shapes_of
from adpo_jax.run.setup import Parts
from adpo_jax.update import SKIPPED, TrainState


class Iteration(NamedTuple):
    """An iteration that has just been done, as a callback sees it.

    Attributes:
      step: iterations done.
      state: the state after the update. The next update takes its memory over, so copy the arrays
        that are to outlive the call.
      groups: the groups that were sampled, graded and trained on.
      metrics: the metrics that are about to be logged, with those of an evaluation where one was
        due.
    """

    step: int
    state: TrainState
    groups: GradedGroups
    metrics: dict[str, float]


# What may fail while samples are drawn and graded, for an update or an evaluation.
_FAILURES = (RewardError, EnvironmentFailed, SourceError)

# The metrics that a callback returns are logged beside those of the iteration.
Callback = Callable[[Iteration], Mapping[str, float] | None]

# The names that say which row of the log it is; no metric of a callback may have them.
_OF_ROWS = ("step", "time", "sft/step")


def train(
    config: ConfigDict,
    workdir: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **options,
) -> dict[str, float]:
    """Trains a policy, or goes on training it.

    Args:
      config: any config of `configs/`.
      workdir: the run's folder; None for runs/<project_name>/<experiment_name>. A run of the same
        config that lies there is resumed.
      callbacks: called with each `Iteration`, on every process, before its metrics are logged.
        Each returns None, or more metrics to log: a dict of numbers by names other than "step",
        "time" and "sft/step". Signals are the caller's: trainer.grace_period_s is of the command
        line.
      options: further keyword arguments of `prepare`.

    Returns:
      The metrics of the last evaluation; empty where the config names no evaluation data.

    Raises:
      ValueError: for a config, data, model or folder that cannot work, before anything is written.
      RewardError: when a reward function fails; the sample at fault is in `samples/`.
      CheckpointError: when the run cannot go on from any of its checkpoints.
      EnvironmentFailed: when an environment cannot go on.
      SourceError: for a recording that is damaged inside, or completions in flight that are lost.
      TrainingStopped: for updates that are not sound, where the config says so.
      SaveError: when no checkpoint can be written.
    """
    if not isinstance(callbacks, Iterable) or not all(map(callable, called := list(callbacks))):
        raise ValueError(f"callbacks is a list of functions; given {callbacks!r:.100}")
    return run(prepare(config, workdir, **options), callbacks=called)


def run(
    prepared: Run, interruption: Interruption | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, float]:
    """Trains from the given parameters or from the newest checkpoint, as `train` does.

    Raises:
      Interrupted: when `interruption` asked the run to stop; the state has been saved.
    """
    config, parts, folder = prepared.config, prepared.parts, prepared.folder
    interruption = interruption or Interruption()
    interruption.checkpoints = folder.checkpoints
    _announce(parts, folder)
    with (
        folder,
        parts,
        contextlib.closing(prepared.source),
        setup.make_checkpoints(config, folder.checkpoints) as checkpoints,
    ):
        restored = None
        if checkpoints.steps:
            with telling("reading the newest checkpoint"):
                restored = checkpoints.restore_latest(state_shapes_of(parts))
        purge_step = -config.sft.steps
        if restored is not None:  # a row that lacks an evaluation is written anew
            purge_step = restored.step + (not _lacks_evaluation(prepared, restored))
        writer = metrics_lib.make_writer(
            folder.root, purge_step, *prepared.trackers, writes=folder.writes
        )
        # An interrupted loop saves before this is closed, since writing a trace takes long.
        profiler = setup.make_profiler(config, folder.profile, parts.num_steps)
        with contextlib.closing(writer), contextlib.closing(profiler):
            writer.write_hparams(config.to_dict())
            folder.write_environment(profiling.environment())
            state, metrics = _start(prepared, restored, writer, checkpoints, interruption)
            del restored  # it would keep the memory of the donated state
            tools = _Tools(writer, checkpoints, interruption, profiler, callbacks)
            loop = _Loop(prepared, state, metrics, tools)
            del state  # the loop has it, and its first update takes its memory over
            loop.iterate()
        prepared.source.end()
        try:
            with interruption.abandonable(), telling("writing the policy"):
                _export(prepared, loop.state)
        except BaseException as reason:  # trainer.save_freq may have left nothing else of the run
            loop.save_after(reason)
            raise
        print(f"done; the policy is in {folder.export}", flush=True)
        rows = metrics_lib.read_jsonl(folder.metrics)
        evaluations = [row for row in rows if "eval/accuracy" in row]
        return {k: v for k, v in evaluations[-1].items() if "eval/" in k} if evaluations else {}


def _announce(parts: Parts, folder: RunFolder) -> None:
    params = parts.policy.abstract_params()
    size, trained = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, lora.split(params)[0])
    )
    trained = f", {trained:,} of them trained," if parts.policy.lora else ""
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"{folder.root}: {size:,} parameters{trained} on {parts.policy.mesh.size} device(s)"
        f"{processes}, "
        f"{len(parts.train_prompts):,} prompts, {parts.num_steps:,} iterations",
        flush=True,
    )


def _start(
    run: Run,
    restored: Restored | None,
    writer: metrics_lib.Writers,
    checkpoints: Checkpoints,
    interruption: Interruption,
) -> tuple[TrainState, dict[str, float]]:
    """The state to iterate from, restored or fresh from the cold start, and its metrics."""
    cold_start, params = run.parts.cold_start, run.params
    if restored is not None:
        where = "iteration" if restored.step >= 0 else "cold start step"
        try:
            state = restored.state.with_frozen(params)
        except ValueError as error:  # the frozen weights have changed
            raise CheckpointError(str(error)) from error
        print(f"going on after {where} {int(state.step)}", flush=True)
        if restored.step >= 0:
            state = state.replace(fixed_params=run.fixed_params)
            run.parts.learner.sizes.restore(restored.sizes)
            return run.parts.learner.put_away(state), restored.metrics
    elif cold_start:
        state = cold_start.init_state(params)
    if cold_start:
        params = cold_start.train(state, writer, checkpoints, interruption).params
    state = run.parts.learner.init_state(params)
    return state.replace(fixed_params=run.fixed_params), {}


class _Tools(NamedTuple):
    """What iterations are logged and saved with, and who may watch or stop them."""

    writer: metrics_lib.Writers
    checkpoints: Checkpoints
    interruption: Interruption
    profiler: profiling.Profiler
    callbacks: Sequence[Callback]


class _Loop:
    """The iterations of a run.

    Attributes:
      state: after the last update.
      metrics: of the iteration that made it.
    """

    def __init__(self, run: Run, state: TrainState, metrics: dict[str, float], tools: _Tools):
        self.state, self.metrics = state, metrics
        self._run, self._tools = run, tools
        self._first = int(state.step)
        algorithm = run.parts.learner.algorithm
        self._guard = setup.make_guard(run.config, algorithm)
        self._silence = setup.make_silence_watch(run.config, algorithm)
        self._saving: dict[str, float] = {}  # times of the iteration before

    def iterate(self) -> None:
        """Does the iterations that are left, and saves the last state.

        Raises:
          Interrupted: when the run was asked to stop; the state has been saved.
          RewardError, EnvironmentFailed, SourceError: as of the source or of an evaluation; the
            newest state has been saved, unless there are several processes.
        """
        run, tools, num_steps = self._run, self._tools, self._run.parts.num_steps
        rows = _logged(run.folder)
        has_row = bool(rows) and rows[-1]["step"] >= self._first
        self._guard.resume(rows if has_row else [*rows, self.metrics])
        run.source.restore(self._first)
        try:
            with Progress("iteration", num_steps, self._first) as progress:
                if not has_row:
                    # The run starts, or was interrupted between an update and its evaluation's end,
                    # or is to be evaluated here and was not before.
                    self._complete_row(progress)
                saves = run.config.trainer.save_freq >= 0
                if self._first == 0 and (saves or tools.checkpoints.is_due(0, self.metrics)):
                    tools.writer.flush()
                    tools.checkpoints.save(0, self.state.saved, self.metrics)
                for step in range(self._first, num_steps):
                    self._iteration(step, progress)
        except Interrupted as reason:
            self._save_where_it_stopped()
            done = int(self.state.step)
            print(f"stopped by {reason} after iteration {done}, which is saved", flush=True)
            raise
        except _FAILURES:
            # One process alone may have failed, and the others wait elsewhere than in a save.
            if jax.process_count() == 1:
                self._save_where_it_stopped()
            raise
        tools.writer.flush()
        run.save_source(int(self.state.step), tools.checkpoints)
        if run.config.trainer.save_freq >= 0:
            with telling("saving the last checkpoint"):
                self.save_by(tools.checkpoints.save_now)

    def _save_where_it_stopped(self) -> None:
        self._tools.writer.flush()
        self._run.save_source(int(self.state.step), self._tools.checkpoints)
        self.save_by(self._tools.checkpoints.save_now)

    def save_by(self, method: Callable) -> None:
        """Saves the state with what belongs to it, by one of the methods of `Checkpoints`."""
        sizes = self._run.parts.learner.sizes.saved
        method(int(self.state.step), self.state.saved, self.metrics, sizes)

    def save_after(self, reason: BaseException) -> None:
        """Saves the state after the last iteration, though `reason` ends the run."""
        if isinstance(reason, Interrupted):
            self.save_by(self._tools.checkpoints.save_now)
        elif jax.process_count() == 1:  # of several, one alone may have failed
            try:
                self.save_by(self._tools.checkpoints.save_now)
            except SaveError as error:  # the reason is what the user has to see to
                say(f"WARNING: {error}")

    def _complete_row(self, progress: Progress) -> None:
        """The row of the state that the loop begins with, where it was not written before."""
        self._evaluate_if_due(progress)
        if self.metrics:
            self._tools.writer.write_scalars(self._first, self.metrics)
            self._tools.checkpoints.complete(self._first, self.metrics)

    def _iteration(self, step: int, progress: Progress) -> None:
        """From prompts to a row of metrics, and a checkpoint where one is due."""
        run, (writer, checkpoints, interruption, profiler, callbacks) = self._run, self._tools
        interruption.check()
        profiler.begin(step + 1)
        compiling = "compiling, " if step == self._first else ""
        with interruption.abandonable(), progress.doing(f"{compiling}sampling, grading"):
            groups = run.source.next(step, self.state.params)
        groups = trained_on(run.config, groups, step)
        if run.config.trainer.rollout_data_dir and run.folder.writes:
            recording.write(run.folder.recordings(run.config), step + 1, groups)
        with progress.doing(f"{compiling}updating"):
            self.state, self.metrics = _learn(run.parts, self.state, groups)
        host_memory.give_back()
        self.metrics |= self._saving | self._silence.metrics(groups)
        _stop_if_unsound(self._guard, run.folder, step + 1, self.metrics, groups)
        show = functools.partial(_show, run.config, progress, writer, run.folder)
        try:
            self._evaluate_if_due(progress)
        except (Interrupted, *_FAILURES):
            # Evaluation and row are made up for later, and of the groups nothing is left.
            _call(callbacks, step + 1, self.state, groups, self.metrics)
            show(step + 1, self.metrics, groups)
            raise
        if checkpoints.num_failures:
            self.metrics["checkpoint/failures"] = float(checkpoints.num_failures)
        _call(callbacks, step + 1, self.state, groups, self.metrics)
        writer.write_scalars(step + 1, self.metrics)
        show(step + 1, self.metrics, groups)
        profiler.end(step + 1)
        self._saving.clear()
        if checkpoints.is_due(step + 1, self.metrics):
            with _timed(self._saving, "time/checkpoint"), progress.doing("saving"):
                writer.flush()  # the log reaches as far as the checkpoint
                run.save_source(step + 1, checkpoints)
                self.save_by(checkpoints.save)

    def _evaluate_if_due(self, progress: Progress) -> None:
        """Adds the metrics of an evaluation where one is due."""
        if not _is_evaluation_due(self._run, int(self.state.step), self.metrics):
            return
        with self._tools.interruption.abandonable(), progress.doing("evaluating"):
            evaluated = _evaluation(self._run, self.state)
        self.metrics |= evaluated  # only now, so that an abandoned evaluation is not saved


def _call(
    callbacks: Sequence[Callback],
    step: int,
    state: TrainState,
    groups: GradedGroups,
    metrics: dict[str, float],
) -> None:
    """Calls all callbacks, and adds the metrics that they return.

    Raises:
      ValueError: where one returns something else, or a metric under a name of `_OF_ROWS`.
    """
    for callback in callbacks:
        found = callback(Iteration(step, state, groups, dict(metrics)))
        name = getattr(callback, "__name__", type(callback).__name__)
        try:
            returned = {str(metric): float(value) for metric, value in (found or {}).items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                f"the callback {name} returns a dict of numbers by name, or None; it returned "
                f"{found!r:.100}"
            ) from None
        for metric in returned.keys() & _OF_ROWS:
            raise ValueError(
                f"the callback {name} returns a metric called {metric}, a name that every row of "
                f"the log has of its own or is told by: call it mine/{metric.rpartition('/')[2]}"
            )
        metrics |= returned


def _logged(folder: RunFolder) -> list[dict]:
    """The rows of the iterations that the run has logged, the same on every process."""
    # Process 0 alone reads the file, since it may be writing it.
    rows = distributed.all_gather(folder.writes and metrics_lib.read_jsonl(folder.metrics))[0]
    return [row for row in rows if "sft/step" not in row]


def _stop_if_unsound(
    guard: Guard, folder: RunFolder, step: int, metrics: dict[str, float], groups: GradedGroups
) -> None:
    """Lets the guard judge an update; the groups of one that was skipped are kept as evidence."""
    evidence = ""
    if metrics[SKIPPED] and folder.writes:
        evidence = str(recording.write(folder.bad_batches, step, groups))
    guard.check(step, metrics, evidence)


def trained_on(config: ConfigDict, groups: GradedGroups, step: int) -> GradedGroups:
    """The groups as the config has them trained on, in the iteration after `step` iterations."""
    if not config.data.mask_truncated_completions:
        return groups
    return with_ages_anew(groups.without_truncated(), step)


def _learn(
    parts: Parts, state: TrainState, groups: GradedGroups
) -> tuple[TrainState, dict[str, float]]:
    """The update, and the metrics of the iteration."""
    rewards, weights = groups.rewards, None
    if parts.learner.algorithm.decouples_rewards:
        model = parts.reward_model
        rewards, weights = groups.rewards_of(model.names), model.weights
    state, metrics = parts.learner.learn(state, groups.sequences, rewards, weights)
    metrics |= reward_metrics(groups.scores, rewards.shape[1])
    metrics |= rollout_metrics(groups) | groups.metrics
    return state, metrics | profiling.memory_metrics()


def _is_evaluation_due(run: Run, done: int, metrics: dict) -> bool:
    """Whether an evaluation is due after so many iterations, and not among the metrics yet."""
    test_freq = run.config.trainer.test_freq
    if done == 0 and not run.config.trainer.val_before_train:
        return False
    due = done in (0, run.parts.num_steps) or (test_freq > 0 and done % test_freq == 0)
    due = due and test_freq >= 0  # -1 is verl's word for never
    return bool(run.parts.val_prompts) and due and "eval/accuracy" not in metrics


def _lacks_evaluation(run: Run, restored: Restored) -> bool:
    """Whether there is a row of a restored state that lacks an evaluation which is due after it."""
    rows = [row for row in _logged(run.folder) if row["step"] == restored.step]
    logged = {name: value for row in rows for name, value in row.items() if value is not None}
    return bool(rows) and _is_evaluation_due(run, restored.step, restored.metrics | logged)


def _evaluation(run: Run, state: TrainState) -> dict[str, float]:
    """The metrics of an evaluation, whose answers are written to the run's samples."""
    parts, step = run.parts, int(state.step)
    reading, times = parts.eval_settings.reading, {}
    try:
        with _timed(times, "time/eval"):
            evaluation = evaluate(
                parts.engine,
                state.params,
                parts.val_prompts,
                parts.tokenizer,
                parts.eval_settings,
                parts.eval_reward_model,
                TrainerState(step, parts.num_steps),
                make_completer(parts.engine, parts.tokenizer, reading, parts.environments),
            )
    except RewardError as error:
        run.folder.write_samples(f"reward_error_eval_{step:06d}", [error.sample or {}])
        raise
    run.folder.write_samples(f"eval_{step:06d}", evaluation.records)
    if step == 0:
        print(f"before training: accuracy {evaluation.metrics['eval/accuracy']:.3f}", flush=True)
    return evaluation.metrics | times


def _export(run: Run, state: TrainState) -> None:
    """Writes the policy, and its adapters alone, unless this state has been exported already."""
    policy, folder = run.parts.policy, run.folder
    # The step alone does not tell: with another learning rate, or from an older checkpoint, the
    # same number of iterations ends in another state.
    digest = digests.digest(state.saved)
    if folder.exported_state == digest:
        return
    if policy.lora:
        base = run.config.actor_rollout_ref.model.path
        adapters.save(folder.adapter, policy, state.params, base_model=base, overwrite=True)
    policy.save_pretrained(
        folder.export, state.params, run.parts.tokenizer, overwrite=folder.export.exists()
    )
    folder.note_export(int(state.step), digest)


def _show(
    config,
    progress: Progress,
    writer: metrics_lib.Writers,
    folder: RunFolder,
    step: int,
    metrics: dict[str, float],
    groups: GradedGroups,
) -> None:
    """The progress line, and now and then a few completions with their rewards."""
    note = (
        f"reward {metrics['reward/mean']:.3f}  length {metrics['rollout/length_mean']:.1f}  "
        f"entropy {metrics['rollout/entropy']:.3f}  {metrics['rollout/tokens_per_s']:.0f} tokens/s"
    )
    if "eval/accuracy" in metrics:
        note += f"  accuracy {metrics['eval/accuracy']:.3f}"
    progress.update(step, note)
    freq = config.trainer.log_samples_freq
    if not freq or step % freq:
        return
    columns = groups.prompts.repeated_columns(config.algorithm.num_generations)
    samples = sample_records(columns[config.data.prompt_key], groups)
    folder.write_samples(f"train_{step:06d}", samples)
    shown = np.random.default_rng([config.trainer.seed, step]).permutation(len(samples))
    shown = [samples[i] for i in shown[: config.trainer.log_num_samples]]
    progress.print_samples(shown)
    writer.write_table(step, "samples", sample_table(shown))


@contextlib.contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name.removeprefix("time/")):
        yield
    times[name] = time.perf_counter() - start


class _CallableModule(types.ModuleType):
    """`adpo_jax.train` is this module, and what people call."""

    def __call__(self, *args, **kwargs) -> dict[str, float]:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
