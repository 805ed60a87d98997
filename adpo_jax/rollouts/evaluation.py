"""Evaluation: held-out prompts answered greedily and by sampling, scored with 95% intervals.

Letters: N prompts, n sampled completions of a prompt, M scores, R bootstrap replicates.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import LEAST_TEMPERATURE, SamplingParams
from adpo_jax.records import Completions, Prompts
from adpo_jax.rewards import NO_RUN, RewardFunction, RewardModel, TrainerState
from adpo_jax.rewards.grading.compare import compare
from adpo_jax.rewards.grading.extract import find_answer
from adpo_jax.rollouts.completing import Completer, Message, OneTurn, Reading

BOOTSTRAP_REPLICATES = 2000
# Of wrong answers of a prompt, so many are compared with each further one.
COMPARED = 16
PREFIX = "eval"


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """The settings of an evaluation.

    Attributes:
      sampling: the settings of the sampled completions; greedy answers take its length limit and
        stop tokens.
      num_samples: sampled completions of each prompt; 0 for greedy answers alone.
      ks: the k of pass@k and maj@k, each at most num_samples.
      category_key: the data column whose values the scores are broken down by; "" for none.
      reading: how completions are read for the rewards; None for the defaults.
      set_key: the data column of the names of validation sets, each of which gets scores of its
        own; "" for a single set.
    """

    sampling: SamplingParams
    num_samples: int = 0
    ks: tuple[int, ...] = ()
    category_key: str = ""
    reading: Reading | None = None
    set_key: str = ""

    def __post_init__(self):
        wrong = [k for k in self.ks if not 1 <= k <= self.num_samples]
        if wrong:
            raise ValueError(
                f"eval.ks: pass@k needs at least k samples a prompt, so 1 <= k <= eval.n="
                f"{self.num_samples}; given {wrong}"
            )
        if self.num_samples and self.sampling.greedy:
            raise ValueError(
                f"eval.temperature is at least {LEAST_TEMPERATURE} where eval.n asks for samples: "
                "greedy ones are all the same, and the greedy accuracy is always measured"
            )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers and their scores.

    Attributes:
      metrics: `eval/accuracy` and the like with `..._low` and `..._high`, their 95% intervals.
      records: one dict a completion, greedy ones first.
    """

    metrics: dict[str, float]
    records: list[dict]


def evaluate(
    engine: Engine,
    params,
    prompts: Prompts,
    tokenizer,
    settings: EvalSettings,
    reward_model: RewardModel | None = None,
    state: TrainerState = NO_RUN,
    completer: Completer | None = None,
) -> Evaluation:
    """Answers every prompt once greedily and `num_samples` times by sampling, and scores them.

    Args:
      prompts: prompts; answers are compared with their column "solution".
      reward_model: grades in place of `good_accuracy`. A completion is right where its reward is
        above 0, and `eval/reward` is the mean reward of the greedy answers.
      state: how far the run has come, for rewards that ask.
      completer: makes the completions; None for one turn of the engine.
    """
    reading = settings.reading or Reading.of(settings.sampling)
    complete = completer or OneTurn(engine, tokenizer, reading)
    if reward_model is None:
        reward_model = RewardModel([RewardFunction(name="good_accuracy")])
    greedy = dataclasses.replace(settings.sampling, n=1, temperature=0.0)
    answers = _graded(complete, params, prompts, tokenizer, greedy, reward_model, reading, state)
    right_N = answers.rewards[:, 0] > 0
    scores = {"accuracy": right_N.astype(np.float64), "reward": answers.rewards[:, 0]}
    records = answers.records("greedy")
    if settings.num_samples:
        sampling = dataclasses.replace(settings.sampling, n=settings.num_samples)
        samples = _graded(
            complete, params, prompts, tokenizer, sampling, reward_model, reading, state
        )
        scores |= sample_scores(samples.rewards > 0, samples.votes(), settings.ks)
        records += samples.records("sampled")

    metrics = with_intervals(scores, PREFIX)
    metrics |= {
        f"{PREFIX}/length_mean": float(answers.lengths.mean()),
        f"{PREFIX}/truncated_frac": float(answers.truncated.mean()),
    }
    taken: set[str] = set()
    for key in filter(None, (settings.set_key, settings.category_key)):
        categories = [str(value) for value in prompts.columns[key]]
        for category in sorted(set(categories)):
            rows = np.array([value == category for value in categories])
            of_category = {name: values[rows] for name, values in scores.items()}
            prefix = f"{PREFIX}/{_free_name(metric_name(category), taken)}"
            metrics |= with_intervals(of_category, prefix)
            metrics[f"{prefix}/num_prompts"] = float(rows.sum())
    return Evaluation(metrics, records)


@dataclasses.dataclass(frozen=True)
class _Graded:
    """Graded completions of N prompts, n of each; those of a prompt are side by side."""

    prompts: Prompts
    prompt_texts: list[str]
    texts: list[list[str]]
    rewards: np.ndarray  # [N, n]
    lengths: np.ndarray  # [N, n]
    truncated: np.ndarray  # [N, n] bool
    transcripts: list[list[Message]] | None  # N * n

    def votes(self) -> list[list[str | None]]:
        """The answer of each completion as text; None where it holds no answer."""
        return [[find_answer(text) for text in texts] for texts in self.texts]

    def records(self, how: str) -> list[dict]:
        """One dict a completion."""
        solutions = self.prompts.columns.get("solution") or [None] * len(self.prompts)
        return [
            {
                "prompt_index": i,
                "prompt": self.prompt_texts[i],
                "sample": j,
                "sampling": how,
                "completion": text,
                "solution": solutions[i],
                "reward": float(self.rewards[i, j]),
                "correct": bool(self.rewards[i, j] > 0),
                "num_tokens": int(self.lengths[i, j]),
                "truncated": bool(self.truncated[i, j]),
            }
            | ({"turns": self.transcripts[i * len(texts) + j]} if self.transcripts else {})
            for i, texts in enumerate(self.texts)
            for j, text in enumerate(texts)
        ]


def _graded(
    complete, params, prompts: Prompts, tokenizer, sampling, reward_model, reading, state
) -> _Graded:
    with distributed.fail_together():
        mine = prompts.share(distributed.own_rows(len(prompts)))
        answers = complete(params, mine, sampling, jax.random.key(0), version=state.global_step)
        columns = answers.reward_columns(reading, reward_model.takes)
        rewards = reward_model.score(answers.texts, columns, state).total
    mine = answers.prompts.token_ids, answers.completions, answers.texts, answers.transcripts
    found = distributed.all_gather((*mine, rewards))
    ids, outs, texts, transcripts, rewards = zip(*found)
    out, rewards = Completions.concatenate(outs), np.concatenate(rewards)
    texts = [text for part in texts for text in part]
    n = sampling.n
    return _Graded(
        prompts,
        tokenizer.batch_decode([row for part in ids for row in part], skip_special_tokens=True),
        [texts[i : i + n] for i in range(0, len(texts), n)],
        rewards.reshape(-1, n).astype(np.float64),
        out.lengths,
        out.finish_reasons == "length",
        None if None in transcripts else [one for part in transcripts for one in part],
    )


def sample_scores(
    right_Nn: np.ndarray, votes: Sequence[Sequence[str | None]], ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """The scores of sampled completions, each [N] float64 in [0, 1].

    Args:
      right_Nn: bool, whether each completion is right.
      votes: N lists of n answers as text, None for no answer.

    Returns:
      "mean@n", and "pass@k" and "maj@k" for each k; see `pass_at_k` and `majority_at_k`.
    """
    n = right_Nn.shape[1]
    scores = {f"mean@{n}": right_Nn.mean(1)}
    candidates = [_by_candidate(right, vote) for right, vote in zip(right_Nn, votes)]
    for k in ks:
        scores[f"pass@{k}"] = pass_at_k(right_Nn.sum(1), n, k)
        scores[f"maj@{k}"] = np.array(
            [_majority_of_blocks(right, vote, k) for right, vote in zip(right_Nn, candidates)]
        )
    return scores


def pass_at_k(num_right: np.ndarray, n: int, k: int) -> np.ndarray:
    """The chance that of k of the n samples, drawn without replacement, at least one is right.

    It is 1 - C(n - c, k) / C(n, k) with c right ones, an unbiased estimate of the chance that one
    of k fresh samples is right.

    Args:
      num_right: [N] integers in [0, n].

    Returns:
      [N] float64.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
    """
    return np.array([1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in num_right])


def majority_at_k(right: Sequence[bool], votes: Sequence[str | None], k: int) -> float:
    """How often the most frequent answer of k samples is right, from the n samples of a prompt.

    The samples are cut into n // k blocks of k, and the result is the mean over the blocks, which
    is unbiased. Equal answers are one candidate however they are written, as the grader judges. A
    tie of the most frequent candidates counts as the expectation of a random draw among them. A
    completion without an answer has no vote.

    Source: Wang et al. 2022, "Self-Consistency", arXiv 2203.11171.
    """
    return _majority_of_blocks(right, _by_candidate(right, votes), k)


def _majority_of_blocks(right: Sequence[bool], votes: Sequence[str | None], k: int) -> float:
    blocks = range(0, len(votes) // k * k, k)
    return sum(_majority_is_right(right[i : i + k], votes[i : i + k]) for i in blocks) / len(blocks)


def _by_candidate(right: Sequence[bool], votes: Sequence[str | None]) -> list[str | None]:
    """The votes, of which wrong ones that are equal are written alike.

    Each is compared with the `COMPARED` most frequent ones.
    """
    counts = Counter(vote for is_right, vote in zip(right, votes) if not is_right and vote)
    first: dict[str, str] = {}
    for vote, _ in counts.most_common():
        others = list(dict.fromkeys(first.values()))[:COMPARED]
        first[vote] = next((other for other in others if compare(vote, other).right), vote)
    return [first.get(vote, vote) for vote in votes]


def _majority_is_right(right: Sequence[bool], votes: Sequence[str | None]) -> float:
    counts = Counter((bool(r), None if r else v) for r, v in zip(right, votes) if r or v)
    most = max(counts.values(), default=0)
    tied = [is_right for (is_right, _), count in counts.items() if count == most]
    return sum(tied) / len(tied) if tied else 0.0


def with_intervals(scores: dict[str, np.ndarray], prefix: str) -> dict[str, float]:
    """Means over prompts, with the ends of their 95% intervals under `..._low` and `..._high`."""
    table_MN = np.stack(list(scores.values()))
    low_M, high_M = bootstrap_interval(table_MN)
    metrics = {}
    for name, values, low, high in zip(scores, table_MN, low_M, high_M):
        metrics[f"{prefix}/{name}"] = float(values.mean())
        metrics[f"{prefix}/{name}_low"] = float(low)
        metrics[f"{prefix}/{name}_high"] = float(high)
    return metrics


def bootstrap_interval(
    table_MN: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of the means of M rows, the N prompts drawn anew with replacement.

    An interval covers the choice of prompts, and that of the samples as far as every prompt has its
    own. It does not cover the training seed.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    N = table_MN.shape[1]
    rng = np.random.default_rng(seed)
    counts_RN = rng.multinomial(N, np.full(N, 1.0 / N), size=BOOTSTRAP_REPLICATES)
    means_MR = table_MN @ counts_RN.T / N
    tail = (1.0 - confidence) / 2
    low_M, high_M = np.quantile(means_MR, [tail, 1.0 - tail], axis=1)
    return low_M, high_M


def _free_name(name: str, taken: set[str]) -> str:
    """The name, or with a number behind it where another group has it; it is taken then."""
    numbers = itertools.count(2)
    free = name
    while free in taken:
        free = f"{name}_{next(numbers)}"
    taken.add(free)
    return free


def metric_name(text: str) -> str:
    """A value from the data in the form that a part of a metric's name may have."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text) or "_"
