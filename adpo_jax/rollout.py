"""From prompts to a batch of scored completions: the arrows around the engine.

Letters: P prompts, G completions of a prompt, S prompt and completion tokens, T completion tokens.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from adpo_jax import distributed
from adpo_jax.engine import Engine, GroupOutput, RolloutOutput
from adpo_jax.packing import Batch
from adpo_jax.rewards import RewardError, RewardModel, Scores
from adpo_jax.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts and the data columns that belong to them.

    Attributes:
      token_ids: one list of token ids a prompt.
      columns: one value a prompt under each name; "solution" is what the answer is compared with.
    """

    token_ids: list[list[int]]
    columns: dict[str, list]

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: Sequence[int]) -> "Prompts":
        """The prompts with these numbers, in this order."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Prompts([self.token_ids[i] for i in rows], columns)

    def digest(self) -> str:
        """SHA-256 of all token ids and solutions, in their order."""
        found = hashlib.sha256()
        for ids, solution in zip(self.token_ids, self.columns["solution"], strict=True):
            found.update(json.dumps([ids, solution], default=str).encode())
        return found.hexdigest()

    def repeated_columns(self, times: int) -> dict[str, list]:
        """The columns with each value repeated, one for every completion of its prompt."""
        return {
            name: [value for value in values for _ in range(times)]
            for name, values in self.columns.items()
        }


@dataclasses.dataclass(frozen=True)
class GradedRollout:
    """Completions of P prompts with their rewards; texts and rewards have P * G entries.

    Attributes:
      seconds: until the last token, and from there until the last reward.
      metrics: what else is to be logged about it.
    """

    out: RolloutOutput
    completions: list[str]
    scores: Scores
    seconds: tuple[float, float]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def concatenate(cls, parts: Sequence["GradedRollout"]) -> "GradedRollout":
        """The rollouts of several processes as one; the slowest says how long they took."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            out=RolloutOutput.concatenate([part.out for part in parts]),
            completions=[text for part in parts for text in part.completions],
            scores=Scores.concatenate([part.scores for part in parts]),
            seconds=tuple(max(seconds) for seconds in zip(*(part.seconds for part in parts))),
        )


def decode_completions(tokenizer, out: RolloutOutput | GroupOutput) -> list[str]:
    """The completions as text, a prompt's side by side, without special tokens."""
    T = out.tokens.shape[-1]
    rows = zip(out.tokens.reshape(-1, T), out.lengths.reshape(-1))
    return tokenizer.batch_decode(
        [tokens[:length].tolist() for tokens, length in rows], skip_special_tokens=True
    )


def generate_and_grade(
    engine: Engine,
    params,
    prompts: Prompts,
    sampling: SamplingParams,
    key: jax.Array,
    tokenizer,
    reward_model: RewardModel,
    on_error: Callable[[RewardError], None] | None = None,
) -> GradedRollout:
    """Samples the completions and grades them; with workers, while other groups still decode.

    Args:
      on_error: called when a reward function fails; where it does not raise, all rewards are NaN.

    Raises:
      RewardError: when a reward function fails and there is no `on_error`.
    """
    P, G = len(prompts), sampling.n
    graded: list = [None] * P

    def submit(group: GroupOutput):
        texts = decode_completions(tokenizer, group)
        columns = prompts.select([group.prompt_index]).repeated_columns(G)
        columns["completion_tokens"] = group.lengths.tolist()
        graded[group.prompt_index] = texts, reward_model.submit(texts, columns)

    started = time.perf_counter()
    overlap = {"on_group_done": submit} if reward_model.has_workers else {}
    with jax.profiler.TraceAnnotation("rollout"):
        out = engine.generate(params, prompts.token_ids, sampling, key, **overlap)
    decoded = time.perf_counter()
    try:
        with jax.profiler.TraceAnnotation("reward"):
            if reward_model.has_workers:
                completions = [text for texts, _ in graded for text in texts]
                scores = Scores.concatenate([handle.result() for _, handle in graded])
            else:
                completions = decode_completions(tokenizer, out)
                columns = prompts.repeated_columns(G)
                columns["completion_tokens"] = out.lengths.reshape(-1).tolist()
                scores = reward_model.score(completions, columns)
    except RewardError as error:
        if on_error is None:
            raise
        on_error(error)
        scores = Scores.unknown(P * G, reward_model.names)
    seconds = (decoded - started, time.perf_counter() - decoded)
    return GradedRollout(out, completions, scores, seconds)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions and grades them; of several processes, each does so for its own prompts.

    Attributes:
      seed: with step and attempt, of the completions.
      keep_sample: called with the step and the error when a reward function fails.
      takes_nonfinite: a reward that is no number makes all of them NaN, and is no error.
    """

    engine: Engine
    sampling: SamplingParams
    tokenizer: object
    reward_model: RewardModel
    seed: int
    keep_sample: Callable[[int, RewardError], None]
    takes_nonfinite: bool = False

    def __call__(self, step: int, attempt: int | None, prompts: Prompts, params) -> GradedRollout:
        """The completions of all prompts, the same on every process.

        Args:
          attempt: None where a step samples once.

        Raises:
          RewardError: when a reward function fails on any process.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        if attempt is not None:
            key = jax.random.fold_in(key, attempt)

        def on_error(error: RewardError):
            if not (error.nonfinite and self.takes_nonfinite):
                raise error
            self.keep_sample(step, error)

        try:
            with distributed.fail_together():
                mine = generate_and_grade(
                    self.engine,
                    params,
                    prompts.select(distributed.own_rows(len(prompts))),
                    self.sampling,
                    key,
                    self.tokenizer,
                    self.reward_model,
                    on_error,
                )
        except RewardError as error:
            self.keep_sample(step, error)
            raise
        return GradedRollout.concatenate(distributed.all_gather(mine))


def sample_records(prompts: Sequence, graded: GradedRollout) -> list[dict]:
    """One record a completion, as they are shown and kept.

    Args:
      prompts: P * G, what each completion answers, as it stands in the data.

    Returns:
      Dicts with "prompt", "completion", "reward", "components" (the score of each reward function,
      None where it skipped the completion) and "num_tokens".
    """
    components = graded.scores.components
    scores = zip(*([None if np.isnan(x) else float(x) for x in v] for v in components.values()))
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "reward": float(reward),
            "components": dict(zip(components, values)),
            "num_tokens": int(length),
        }
        for prompt, completion, reward, values, length in zip(
            prompts,
            graded.completions,
            graded.scores.total,
            scores,
            graded.out.lengths.reshape(-1),
            strict=True,
        )
    ]


def make_batch(prompts: Prompts, out: RolloutOutput, *, max_prompt_length: int) -> Batch:
    """Prompts and completions side by side, as the update wants them.

    The sampler's log-probs are those over the whole vocabulary where the rollout has them.
    """
    P, G, T = out.tokens.shape
    tokens = np.zeros((P, G, max_prompt_length + T), np.int32)
    attention_mask = np.zeros_like(tokens)
    for row, ids in enumerate(prompts.token_ids):
        tokens[row, :, max_prompt_length - len(ids) : max_prompt_length] = ids
        attention_mask[row, :, max_prompt_length - len(ids) : max_prompt_length] = 1
    tokens[:, :, max_prompt_length:] = np.where(out.mask > 0, out.tokens, 0)
    attention_mask[:, :, max_prompt_length:] = out.mask
    mask = np.asarray(out.mask, np.float32)
    log_probs = out.log_probs if out.full_log_probs is None else out.full_log_probs
    return Batch(tokens, attention_mask, mask, np.asarray(log_probs, np.float32))


def rollout_metrics(graded: GradedRollout) -> dict[str, float]:
    """Lengths in tokens, the share cut off at the limit, tokens a second, and variety."""
    out, seconds = graded.out, max(graded.seconds[0], 1e-9)
    P, G = out.lengths.shape
    texts = graded.completions
    different = [len(set(texts[i : i + G])) / G for i in range(0, P * G, G)]
    return {
        "rollout/length_mean": float(out.lengths.mean()),
        "rollout/length_max": float(out.lengths.max()),
        "rollout/truncated_frac": float(np.mean(out.finish_reason == "length")),
        "rollout/tokens_per_s": float(out.lengths.sum() / seconds),
        "rollout/unique_frac": float(np.mean(different)),
        "time/rollout": graded.seconds[0],
        "time/reward": graded.seconds[1],
    }


@np.errstate(invalid="ignore")  # of rewards that are not finite, the metrics are not either
def reward_metrics(scores: Scores, G: int) -> dict[str, float]:
    """Mean and spread of the rewards, of each component, and of the groups of G."""
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
        "groups/zero_std_frac": float(np.mean(np.ptp(rewards_PG, axis=1) == 0.0)),
        "groups/all_right_frac": float(np.mean((rewards_PG > 0.0).all(axis=1))),
        "groups/all_wrong_frac": float(np.mean((rewards_PG <= 0.0).all(axis=1))),
    }
    for name, values in scores.components.items():
        graded = values[~np.isnan(values)]  # a function may skip a sample
        if graded.size:
            metrics[f"reward/{name}"] = float(graded.mean())
    return metrics
