"""Evaluation: greedy answers to held-out prompts."""

import dataclasses

import jax
import numpy as np

from adpo_jax.engine import Engine
from adpo_jax.rewards import good_accuracy
from adpo_jax.rollout import Prompts, decode_completions
from adpo_jax.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Greedy answers and their verdicts.

    Attributes:
      metrics: `eval/accuracy` (share of right final answers), `eval/length_mean` (tokens),
        `eval/truncated_frac` (share that ran into the length limit).
      completions: the answers as text, one a prompt.
      correct: [N] bool.
    """

    metrics: dict[str, float]
    completions: list[str]
    correct: np.ndarray


def evaluate(
    engine: Engine, params, prompts: Prompts, tokenizer, sampling: SamplingParams
) -> Evaluation:
    """Answers every prompt once, greedily, and compares the final answer with the solution.

    Args:
      sampling: the run's settings; number of samples and temperature are replaced.
    """
    greedy = dataclasses.replace(sampling, n=1, temperature=0.0)
    out = engine.generate(params, prompts.token_ids, greedy, jax.random.key(0))
    texts = decode_completions(tokenizer, out)
    correct = np.array(good_accuracy(texts, prompts.columns["solution"])) == 1.0
    metrics = {
        "eval/accuracy": float(correct.mean()),
        "eval/length_mean": float(out.lengths.mean()),
        "eval/truncated_frac": float(np.mean(out.finish_reason == "length")),
    }
    return Evaluation(metrics, texts, correct)
