"""Makes graded groups of prompts: samples with the engine, grades with the reward model.

Letters: P prompts, G completions of a prompt.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine.engine import Engine, FinishedGroup
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import NO_RUN, RewardError, RewardModel, Scores, TrainerState
from adpo_jax.rollouts.source import Source


@dataclasses.dataclass(frozen=True)
class Reading:
    """How completions are read for the rewards.

    Attributes:
      prompt_key: the data column that rewards are given as `prompts`; "" for none.
      skip_special_tokens: whether no special token is read. Otherwise those that end, begin or pad
        a text are left out, and others stay: a tokenizer may have made `<answer>` one.
      stop_token_ids: the tokens that end a completion, beside those that the tokenizer names.
    """

    prompt_key: str = ""
    skip_special_tokens: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def texts(self, tokenizer, completions: Sequence[Completion]) -> list[str]:
        """The text of each completion."""
        ids = [completion.tokens.tolist() for completion in completions]
        if self.skip_special_tokens:
            return tokenizer.batch_decode(ids, skip_special_tokens=True)
        named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad"))
        ends = {*self.stop_token_ids, *named}
        ids = [[token for token in row if token not in ends] for row in ids]
        return tokenizer.batch_decode(ids, skip_special_tokens=False)

    def columns(
        self, prompts: Prompts, completions: Sequence[Completion], reward_model: RewardModel
    ) -> dict[str, list]:
        """The data columns of P prompts, one value for each of P * G completions, and the offers.

        See `rewards.binding.OFFERED`.
        """
        columns = prompts.repeated_columns(len(completions) // max(len(prompts), 1))
        if self.prompt_key in columns:
            columns["prompts"] = columns[self.prompt_key]
        columns["completion_tokens"] = [len(completion) for completion in completions]
        if reward_model.takes("completion_ids"):
            columns["completion_ids"] = [completion.tokens.tolist() for completion in completions]
        return columns


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
) -> GradedGroups:
    """Samples completions and grades them; workers grade while other groups still decode.

    Args:
      on_error: called when a reward function fails; if it does not raise, all rewards are NaN.
      version: iterations done by the parameters, for the records.
      reading: how completions are read; None for the defaults.
      state: how far the run has come, for rewards that ask.

    Raises:
      RewardError: when a reward function fails and there is no `on_error`.
    """
    P, G = len(prompts), sampling.n
    graded: list = [None] * P
    reading = reading or Reading(stop_token_ids=tuple(sampling.stop_token_ids))

    def submit(group: FinishedGroup):
        texts = reading.texts(tokenizer, group.completions)
        prompt = prompts.select([group.prompt_index])
        columns = reading.columns(prompt, group.completions, reward_model)
        graded[group.prompt_index] = texts, reward_model.submit(texts, columns, state)

    started = time.perf_counter()
    overlap = {"on_group_done": submit} if reward_model.has_workers else {}
    with jax.profiler.TraceAnnotation("rollout"):
        out = engine.generate(params, prompts.token_ids, sampling, key, version=version, **overlap)
    decoded = time.perf_counter()
    try:
        with jax.profiler.TraceAnnotation("reward"):
            if reward_model.has_workers:
                texts = [text for texts, _ in graded for text in texts]
                scores = Scores.concatenate([handle.result() for _, handle in graded])
            else:
                texts = reading.texts(tokenizer, out.flat)
                columns = reading.columns(prompts, out.flat, reward_model)
                scores = reward_model.score(texts, columns, state)
    except RewardError as error:
        if on_error is None:
            raise
        on_error(error)
        scores = Scores.unknown(P * G, reward_model.names)
    seconds = (decoded - started, time.perf_counter() - decoded)
    return GradedGroups(prompts, out, texts, scores, seconds)


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

    def __call__(self, step: int, attempt: int | None, prompts: Prompts, params) -> GradedGroups:
        """The completions of all prompts, the same on every process.

        Args:
          attempt: the number of the attempt, from 0; None where a step samples once.

        Raises:
          RewardError: when a reward function fails on any process.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        if attempt is not None:
            key = jax.random.fold_in(key, attempt)
        try:
            with distributed.fail_together():
                mine = prompts.select(distributed.own_rows(len(prompts)))
                graded = self._graded(step, mine, self.engine, params, key)
        except RewardError as error:
            self.keep_sample(step, error)
            raise
        return GradedGroups.concatenate(distributed.all_gather(graded))

    def graded(self, step: int, prompts: Prompts, completions: Completions) -> GradedGroups:
        """Completions of this process, graded.

        Raises:
          RewardError: when a reward function fails.
        """
        return self._graded(step, prompts, _Sampled(completions), None, None)

    def _graded(self, step: int, prompts: Prompts, engine, params, key) -> GradedGroups:
        def on_error(error: RewardError):
            if not (error.nonfinite and self.takes_nonfinite):
                raise error
            self.keep_sample(step, error)

        return generate_and_grade(
            engine,
            params,
            prompts,
            self.sampling,
            key,
            self.tokenizer,
            self.reward_model,
            on_error,
            version=step,
            reading=self.reading,
            state=TrainerState(step, self.num_steps),
        )


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """Stands for an engine where the completions are there already."""

    completions: Completions

    def generate(self, *_, on_group_done=None, **__) -> Completions:
        for index, group in enumerate(self.completions.groups):
            if on_group_done is not None:
                on_group_done(FinishedGroup(index, group))
        return self.completions


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
      of the completion, where they did.
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
    if extras:
        for record, values in zip(records, zip(*extras.values(), strict=True), strict=True):
            record["extra"] = dict(zip(extras, values))
    return records


def rollout_metrics(graded: GradedGroups) -> dict[str, float]:
    """Lengths in tokens, the share cut off at the limit, tokens a second, and variety."""
    lengths, seconds = graded.completions.lengths, max(graded.seconds[0], 1e-9)
    P, G = lengths.shape
    texts = graded.texts
    masked = [not completion.trained.any() for completion in graded.completions.flat]
    different = [len(set(texts[i : i + G])) / G for i in range(0, P * G, G)]
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_frac": float(np.mean(graded.completions.finish_reasons == "length")),
        "rollout/masked_frac": float(np.mean(masked)),
        "rollout/tokens_per_s": float(lengths.sum() / seconds),
        "rollout/unique_frac": float(np.mean(different)),
        "time/rollout": graded.seconds[0],
        "time/reward": graded.seconds[1],
    }


def logged_metrics(scores: Scores) -> dict[str, float]:
    """The mean of each number that reward functions logged, "reward/<function>/<name>"."""
    return {f"reward/{name}": float(np.mean(values)) for name, values in scores.logged.items()}


@np.errstate(invalid="ignore")  # rewards that are not finite give metrics that are not either
def reward_metrics(scores: Scores, G: int) -> dict[str, float]:
    """Mean and spread of the rewards, of each component and of groups of G, and what was logged."""
    rewards_PG = scores.total.reshape(-1, G)
    spread_P = rewards_PG.std(axis=1)
    counts = scores.counts
    metrics = {
        "reward/mean": float(rewards_PG.mean()),
        "reward/std": float(rewards_PG.std()),
        "reward/group_std": float(spread_P.mean()),
        "reward/timeouts": float(counts["timeouts"]),
        "reward/crashes": float(counts["crashes"]),
        "reward/unparsed_frac": counts["unparsed"] / rewards_PG.size,
        # Recordings made before faults were counted have no such count.
        "reward/grader_faults": float(counts.get("grader_faults", 0)),
        "groups/zero_std_frac": float(np.mean(np.ptp(rewards_PG, axis=1) == 0.0)),
        "groups/all_right_frac": float(np.mean((rewards_PG > 0.0).all(axis=1))),
        "groups/all_wrong_frac": float(np.mean((rewards_PG <= 0.0).all(axis=1))),
    }
    metrics |= logged_metrics(scores)
    for name, values in scores.components.items():
        graded = values[~np.isnan(values)]  # a function may skip a sample
        if graded.size:
            metrics[f"reward/{name}"] = float(graded.mean())
    return metrics
