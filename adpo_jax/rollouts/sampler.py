"""Makes graded groups of prompts: samples with the engine, grades with the reward model.

Letters: P prompts, G completions of a prompt.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.records import Completions, GradedGroups, Prompts
from adpo_jax.rewards import NO_RUN, RewardError, RewardModel, Scores, TrainerState
from adpo_jax.rollouts.completing import Answers, Completer, OneTurn, Reading
from adpo_jax.rollouts.source import Source


def generate_and_grade(
    engine: Engine,
    params,
    prompts: Prompts,
    sampling: SamplingParams,
    key: jax.Array,
    tokenizer,
    reward_model: RewardModel,
    on_error: Callable[[RewardError], None] | None = None,
    *,
    version: int = 0,
    reading: Reading | None = None,
    state: TrainerState = NO_RUN,
    completer: Completer | None = None,
) -> GradedGroups:
    """Samples completions and grades them; workers grade while other groups still decode.

    Args:
      on_error: called when a reward function fails; if it does not raise, all rewards are NaN.
      version: iterations done by the parameters, for the records.
      reading: how completions are read; None for the defaults.
      state: how far the run has come, for rewards that ask.
      completer: makes the completions; None for one turn of the engine.

    Raises:
      RewardError: when a reward function fails and there is no `on_error`.
    """
    reading = reading or Reading.of(sampling)
    complete = completer or OneTurn(engine, tokenizer, reading)
    grading = _Grading(reward_model, reading, state, on_error)
    handles: list = [None] * len(prompts)

    def begin(place: int, answers: Answers):
        handles[place] = grading.begin(answers)

    started = time.perf_counter()
    overlap = {"on_group_done": begin} if reward_model.has_workers else {}
    with jax.profiler.TraceAnnotation("rollout"):
        answers = complete(params, prompts, sampling, key, version=version, **overlap)
    return grading.graded(answers, time.perf_counter() - started, handles)


class _Grading(NamedTuple):
    """How answers are graded; for the attributes see `generate_and_grade`."""

    reward_model: RewardModel
    reading: Reading
    state: TrainerState
    on_error: Callable[[RewardError], None] | None

    def begin(self, answers: Answers):
        """Has workers grade answers; returns a handle whose `result` is their scores."""
        return self.reward_model.submit(answers.texts, self._columns(answers), self.state)

    def graded(
        self, answers: Answers, seconds: float, handles: Sequence | None = None
    ) -> GradedGroups:
        """The answers with their scores.

        Args:
          seconds: the time that it took to sample them.
          handles: those of each prompt's answers, where there are workers; None to begin here.
        """
        started = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation("reward"):
                scores = self._scores(answers, handles)
        except RewardError as error:
            if self.on_error is None:
                raise
            self.on_error(error)
            scores = Scores.unknown(len(answers.texts), self.reward_model.names)
        return GradedGroups(
            answers.prompts,
            answers.completions,
            answers.texts,
            dataclasses.replace(scores, logged=scores.logged | answers.logged),
            (seconds, time.perf_counter() - started),
            transcripts=answers.transcripts,
        )

    def _scores(self, answers: Answers, handles: Sequence | None) -> Scores:
        if not self.reward_model.has_workers:
            return self.reward_model.score(answers.texts, self._columns(answers), self.state)
        if handles is None:
            handles = [self.begin(answers.select([p])) for p in range(len(answers.prompts))]
        return Scores.concatenate([handle.result() for handle in handles])

    def _columns(self, answers: Answers) -> dict[str, list]:
        return answers.reward_columns(self.reading, self.reward_model.takes)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions and grades them; each of several processes does its own prompts.

    Attributes:
      seed: decides the completions, together with step and attempt.
      keep_sample: called with the step and the error when a reward function fails.
      takes_nonfinite: whether a reward that is no finite number makes all rewards NaN, in place of
        an error.
      reading: how completions are read for the rewards; None for the defaults.
      num_steps: iterations of the whole run, for rewards that ask.
      completer: makes the completions; None for one turn of the engine.
    """

    engine: Engine
    sampling: SamplingParams
    tokenizer: object
    reward_model: RewardModel
    seed: int
    keep_sample: Callable[[int, RewardError], None]
    takes_nonfinite: bool = False
    reading: Reading | None = None
    num_steps: int = 0
    completer: Completer | None = None

    def __call__(self, step: int, attempt: int | None, prompts: Prompts, params) -> GradedGroups:
        """The completions of all prompts, the same on every process.

        Args:
          attempt: the number of the attempt, from 0; None where a step samples once.

        Raises:
          RewardError: when a reward function fails on any process.
        """
        key = self.key(step, attempt)
        with self.keeping_samples(step), distributed.fail_together():
            mine = prompts.share(distributed.own_rows(len(prompts)))
            graded = generate_and_grade(
                self.engine,
                params,
                mine,
                self.sampling,
                key,
                self.tokenizer,
                self.reward_model,
                functools.partial(self._on_error, step),
                version=step,
                reading=self.reading,
                state=TrainerState(step, self.num_steps),
                completer=self.completer,
            )
        return GradedGroups.concatenate(distributed.all_gather(graded))

    def key(self, step: int, attempt: int | None) -> jax.Array:
        """The key of all completions of a step; see `__call__`."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return key if attempt is None else jax.random.fold_in(key, attempt)

    @contextlib.contextmanager
    def keeping_samples(self, step: int) -> Iterator[None]:
        """Keeps the sample that a reward function fails on."""
        try:
            yield
        except RewardError as error:
            self.keep_sample(step, error)
            raise

    def of_one_turn(self, prompts: Prompts, completions: Completions) -> Answers:
        """Completions of one turn as answers."""
        reading = self.reading or Reading.of(self.sampling)
        return Answers(prompts, completions, reading.texts(self.tokenizer, completions.flat))

    def graded(self, step: int, answers: Answers) -> GradedGroups:
        """Answers of this process, graded.

        Raises:
          RewardError: when a reward function fails.
        """
        reading = self.reading or Reading.of(self.sampling)
        state, on_error = (
            TrainerState(step, self.num_steps),
            functools.partial(self._on_error, step),
        )
        return _Grading(self.reward_model, reading, state, on_error).graded(answers, seconds=0.0)

    def _on_error(self, step: int, error: RewardError) -> None:
        if not (error.nonfinite and self.takes_nonfinite):
            raise error
        self.keep_sample(step, error)


@dataclasses.dataclass(frozen=True)
class OnTheSpot(Source):
    """Samples completions of the step's prompts, and grades them.

    Attributes:
      prompts_of: number of a batch, from 0 -> its prompts.
    """

    sampler: Sampler
    prompts_of: Callable[[int], Prompts]

    def next(self, step: int, params) -> GradedGroups:
        return self.sampler(step, None, self.prompts_of(step), params)


def sample_records(prompts: Sequence, graded: GradedGroups) -> list[dict]:
    """One dict a completion, in the form in which samples are shown and kept.

    Args:
      prompts: P * G, the prompt of each completion as it stands in the data.

    Returns:
      Dicts with "prompt", "completion", "reward", "components" (the score of each reward function,
      None where it skipped the completion) and "num_tokens"; "extra", what reward functions logged
      of the completion, where they did; "turns", its messages, where it has several turns.
    """
    components = graded.scores.components
    scores = zip(*([None if np.isnan(x) else float(x) for x in v] for v in components.values()))
    extras = graded.scores.extras
    records = [
        {
            "prompt": prompt,
            "completion": text,
            "reward": float(reward),
            "components": dict(zip(components, values)),
            "num_tokens": len(completion),
        }
        for prompt, text, reward, values, completion in zip(
            prompts,
            graded.texts,
            graded.scores.total,
            scores,
            graded.completions.flat,
            strict=True,
        )
    ]
    for record, messages in zip(records, graded.transcripts or ()):
        if messages is not None:
            record["turns"] = messages
    if extras:
        for record, values in zip(records, zip(*extras.values(), strict=True), strict=True):
            record["extra"] = dict(zip(extras, values))
    return records


def sample_table(records: Sequence[dict]) -> list[dict]:
    """The records of `sample_records` without dicts in them, all with the same keys."""
    nested = ("components", "extra")
    flat = [
        {name: value for name, value in record.items() if name not in nested}
        | record["components"]
        | record.get("extra", {})
        for record in records
    ]
    names = dict.fromkeys(name for record in flat for name in record)
    return [{name: record.get(name, "") for name in names} for record in flat]


def rollout_metrics(graded: GradedGroups) -> dict[str, float]:
    """Lengths in tokens, the share cut off at the limit, tokens a second, and variety.

    Where long completions lie in pages, also how often a sample waited for some.
    """
    lengths, seconds = graded.completions.lengths, max(graded.seconds[0], 1e-9)
    P, G = lengths.shape
    texts = graded.texts
    masked = [not completion.trained.any() for completion in graded.completions.flat]
    different = [len(set(texts[i : i + G])) / G for i in range(0, P * G, G)]
    stats, metrics = graded.completions.stats, turn_metrics(graded)
    if "preempted" in stats:
        metrics["rollout/preempted"] = float(stats["preempted"] + stats.get("evicted", 0))
    return metrics | {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_frac": float(np.mean(graded.completions.finish_reasons == "length")),
        "rollout/masked_frac": float(np.mean(masked)),
        "rollout/tokens_per_s": float(lengths.sum() / seconds),
        "rollout/unique_frac": float(np.mean(different)),
        "time/rollout": graded.seconds[0],
        "time/reward": graded.seconds[1],
    }


def turn_metrics(graded: GradedGroups) -> dict[str, float]:
    """Of completions in turns: their number, what tools did, and rewards by number of turns."""
    stats = graded.completions.stats
    turns = np.array([int(c.turns.max(initial=0)) + 1 for c in graded.completions.flat])
    if "tool_calls" not in stats and turns.max(initial=1) == 1:
        return {}
    rewards = graded.scores.total
    metrics = {f"reward/of_{n}_turns": float(rewards[turns == n].mean()) for n in np.unique(turns)}
    metrics["rollout/turns"] = float(turns.mean())
    if "tool_calls" in stats:
        metrics["tools/calls"] = stats["tool_calls"] / len(turns)
        metrics["tools/failures"] = float(stats["tool_failures"])
        metrics["tools/seconds"] = stats["tool_microseconds"] / 1e6 / max(stats["tool_calls"], 1)
    return metrics


def logged_metrics(scores: Scores) -> dict[str, float]:
    """The mean of each number that reward functions logged, "reward/<function>/<name>"."""
    return {f"reward/{name}": float(np.mean(values)) for name, values in scores.logged.items()}


@np.errstate(invalid="ignore")  # rewards that are not finite give metrics that are not either
def reward_metrics(scores: Scores, G: int) -> dict[str, float]:
    """Mean and spread of the rewards, of each component and of groups of G, and what was logged."""
    rewards_PG = scores.total.reshape(-1, G)
    std_P = rewards_PG.std(axis=1)
    metrics = {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        "reward/group_std": float(std_P.mean()),
        "groups/zero_std_frac": float(np.mean(np.ptp(rewards_PG, axis=1) == 0.0)),
        "groups/all_right_frac": float(np.mean((rewards_PG > 0.0).all(axis=1))),
        "groups/all_wrong_frac": float(np.mean((rewards_PG <= 0.0).all(axis=1))),
    }
    if counts := scores.counts:
        metrics |= {
            "reward/timeouts": float(counts["timeouts"]),
            "reward/crashes": float(counts["crashes"]),
            "reward/unparsed_frac": counts["unparsed"] / rewards_PG.size,
            # A recording may lack this count.
            "reward/grader_faults": float(counts.get("grader_faults", 0)),
        }
    metrics |= logged_metrics(scores)
    for name, values in scores.components.items():
        graded = values[~np.isnan(values)]  # a function may skip a sample
        if graded.size:
            metrics[f"reward/{name}"] = float(graded.mean())
    return metrics
