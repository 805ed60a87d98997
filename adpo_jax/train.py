"""The road: prompts -> rollout -> rewards -> anchor log-probs -> loss -> update -> metrics,
checkpoint, evaluation.

Left out here and found next door: what each part is made from (`setup`), the anchor forward and
the optimizer steps of an iteration (`learner`).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from adpo_jax import data, setup, sft
from adpo_jax import metrics as metrics_lib
from adpo_jax.checkpoints import Checkpoints
from adpo_jax.config_checks import finalized
from adpo_jax.evaluate import evaluate
from adpo_jax.progress import Progress
from adpo_jax.rewards import RewardError
from adpo_jax.rollout import (
    Prompts,
    generate_and_grade,
    make_batch,
    reward_metrics,
    rollout_metrics,
    sample_records,
)
from adpo_jax.run_folder import RunFolder
from adpo_jax.setup import Parts
from adpo_jax.update import TrainState, init_state


def train(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains a policy, or goes on training it.

    Args:
      config: any config of `configs/`.
      workdir: the run's folder. One with a run of the same config is resumed.

    Returns:
      The metrics of the last evaluation; empty where the config names no evaluation data.

    Raises:
      ValueError: for a config, data, model or folder that cannot work, before anything is written.
      RewardError: when a reward function fails; the sample at fault is in `samples/`.
      FloatingPointError: for a loss or gradient that is not finite.
    """
    return run(*prepare(config, workdir))


def prepare(config: ConfigDict, workdir: Path) -> tuple[ConfigDict, Parts, RunFolder, Any]:
    """Finds every mistake that can be found before training, then claims the run's folder.

    Returns:
      The arguments of `run`: the final config, the parts, the folder, and the parameters that a
      fresh run starts from (None where there is a checkpoint to go on from).

    Raises:
      ValueError: nothing has been written then.
    """
    config = finalized(config)
    folder = RunFolder(Path(workdir))
    folder.check(config)
    parts = setup.build(config)
    params = None if folder.has_checkpoint else parts.initial_params()
    folder.claim(config)
    return config, parts, folder, params


def run(config: ConfigDict, parts: Parts, folder: RunFolder, params) -> dict[str, float]:
    """Trains, from `params` or from the newest checkpoint; see `train`."""
    _announce(parts, folder)
    with (
        parts.reward_model,
        Checkpoints(
            folder.checkpoints,
            save_freq=config.trainer.save_freq,
            keep=config.trainer.save_total_limit,
        ) as checkpoints,
    ):
        first = checkpoints.latest_step
        purge_step = 0 if first is None else first + 1
        with contextlib.closing(metrics_lib.make_writer(folder.root, purge_step)) as writer:
            if first is None:
                state = _start(config, parts, params, folder, writer)
                checkpoints.save(0, state)
            else:
                state = checkpoints.restore_latest(parts.learner.abstract_state())
                print(f"going on after iteration {first}", flush=True)
            state = _iterate(config, parts, state, folder, writer, checkpoints)
            checkpoints.save(int(state.step), state)
        if not folder.export.exists():
            parts.policy.save_pretrained(folder.export, state.params, parts.tokenizer)
        print(f"done; the policy is in {folder.export}", flush=True)
        last = metrics_lib.read_jsonl(folder.root / "metrics.jsonl")
        evaluations = [row for row in last if "eval/accuracy" in row]
        return {k: v for k, v in evaluations[-1].items() if "eval/" in k} if evaluations else {}


def _announce(parts: Parts, folder: RunFolder) -> None:
    size = sum(x.size for x in jax.tree.leaves(parts.policy.abstract_params()))
    print(
        f"{folder.root}: {size:,} parameters on {parts.policy.mesh.size} device(s), "
        f"{len(parts.train_prompts):,} prompts, {parts.num_steps:,} iterations",
        flush=True,
    )


def _start(config, parts: Parts, params, folder: RunFolder, writer) -> TrainState:
    """The cold start, and what the policy can do before the first iteration."""
    if parts.cold_start:
        params = _cold_start(config, parts, params, writer)
    state = parts.learner.init_state(params)
    if parts.val_prompts:
        metrics = _evaluate(parts, state, folder, 0)
        writer.write_scalars(0, metrics)
        print(f"before training: accuracy {metrics['eval/accuracy']:.3f}", flush=True)
    return state


def _iterate(
    config, parts: Parts, state: TrainState, folder, writer, checkpoints: Checkpoints
) -> TrainState:
    """The loop."""
    start, num_steps = int(state.step), parts.num_steps
    root_key = jax.random.key(config.trainer.seed)
    test_freq = config.trainer.test_freq
    with Progress("iteration", num_steps, start) as progress:
        for step in range(start, num_steps):
            prompts = _prompts_for_step(config, parts.train_prompts, step)
            key = jax.random.fold_in(root_key, step)
            state, metrics, samples = _iteration(config, parts, state, prompts, key, folder)
            done = step + 1
            if parts.val_prompts and (done == num_steps or (test_freq and done % test_freq == 0)):
                metrics |= _evaluate(parts, state, folder, done)
            writer.write_scalars(done, metrics)
            _show(config, progress, folder, done, metrics, samples)
            checkpoints.maybe_save(done, state)
    return state


def _prompts_for_step(config, prompts: Prompts, step: int) -> Prompts:
    rows = data.prompt_indices(
        step,
        seed=config.trainer.seed,
        num_rows=len(prompts),
        batch_size=config.data.train_batch_size,
    )
    return prompts.select(rows)


def _iteration(
    config, parts: Parts, state: TrainState, prompts: Prompts, key: jax.Array, folder: RunFolder
) -> tuple[TrainState, dict[str, float], list[dict]]:
    """One iteration: (new state, metrics, one record a completion)."""
    G = parts.sampling.n
    try:
        graded = generate_and_grade(
            parts.engine,
            state.params,
            prompts,
            parts.sampling,
            key,
            parts.tokenizer,
            parts.reward_model,
        )
    except RewardError as error:
        folder.write_samples(f"reward_error_{int(state.step) + 1:06d}", [error.sample or {}])
        raise
    times = dict(zip(("time/rollout", "time/reward"), graded.seconds))
    with _timed(times, "time/update"):
        batch = make_batch(prompts, graded.out, max_prompt_length=config.data.max_prompt_length)
        state, metrics = parts.learner.learn(state, batch, graded.scores.total.reshape(-1, G))
    metrics |= reward_metrics(graded.scores, G)
    metrics |= rollout_metrics(graded.out, times["time/rollout"]) | times
    texts = prompts.repeated_columns(G)[config.data.prompt_key]
    return state, metrics, sample_records(texts, graded)


def _evaluate(parts: Parts, state: TrainState, folder: RunFolder, step: int) -> dict[str, float]:
    times: dict[str, float] = {}
    with _timed(times, "time/eval"):
        evaluation = evaluate(
            parts.engine, state.params, parts.val_prompts, parts.tokenizer, parts.sampling
        )
    solutions = parts.val_prompts.columns["solution"]
    verdicts = zip(evaluation.completions, solutions, evaluation.correct.tolist())
    folder.write_samples(
        f"eval_{step:06d}",
        [{"completion": c, "solution": s, "correct": v} for c, s, v in verdicts],
    )
    return evaluation.metrics | times


def _cold_start(config, parts: Parts, params, writer):
    """Supervised training on demonstrations; returns the new parameters."""
    num_steps, cold_start = config.sft.steps, parts.cold_start
    state = init_state(parts.policy, params, cold_start.optimizer)
    sft_step = sft.make_sft_step(parts.policy, cold_start.optimizer)
    batches = sft.batches(
        cold_start.demonstrations.prompts,
        cold_start.demonstrations.completions,
        num_steps=num_steps,
        batch_size=config.sft.batch_size,
        seed=config.trainer.seed,
        prompt_length=config.data.max_prompt_length,
        length=config.data.max_response_length,
    )
    with Progress("cold start", num_steps) as progress:
        for step, batch in enumerate(batches, start=1):
            state, loss = sft_step(state, *parts.learner.put(batch))
            if step % 50 == 0 or step == num_steps:
                progress.update(step, f"loss {float(loss):.3f}")
                writer.write_scalars(0, {"sft/step": step, "sft/loss": float(loss)})
    return state.params


def _show(config, progress, folder: RunFolder, step: int, metrics: dict, samples: list[dict]):
    """The progress line, and now and then a few completions with their rewards."""
    note = (
        f"reward {metrics['reward/mean']:.3f}  length {metrics['rollout/length_mean']:.1f}  "
        f"entropy {metrics['policy/entropy']:.3f}  {metrics['rollout/tokens_per_s']:.0f} tokens/s"
    )
    if "eval/accuracy" in metrics:
        note += f"  accuracy {metrics['eval/accuracy']:.3f}"
    progress.update(step, note)
    freq = config.trainer.log_samples_freq
    if not freq or step % freq:
        return
    folder.write_samples(f"train_{step:06d}", samples)
    shown = np.random.default_rng([config.trainer.seed, step]).permutation(len(samples))
    progress.print_samples([samples[i] for i in shown[: config.trainer.log_num_samples]])


@contextlib.contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start
