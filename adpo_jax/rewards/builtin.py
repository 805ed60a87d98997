"""The ready rewards. Each takes completions as strings or as chat messages."""

from adpo_jax.rewards.compare import compare
from adpo_jax.rewards.extract import find_answer, find_reference
from adpo_jax.rewards.limits import MAX_NGRAM_WORDS

Completions = list[str] | list[list[dict[str, str]]]


def texts(completions: Completions) -> list[str]:
    """The text of each completion: itself, or what its last message says."""
    return [c if isinstance(c, str) else c[-1]["content"] if c else "" for c in completions]


def good_accuracy(
    completions: Completions,
    solution: list,
    ngram_size: int = 4,
    max_penalty: float = -0.5,
    penalty_scale_factor: float = 0.1,
    **columns,
) -> list[float]:
    """1.0 for a right answer; otherwise a small penalty for repeating itself, never above 0.

    A wrong completion gets `penalty_scale_factor * max_penalty * (1 - distinct / all)` over its
    n-grams of lower-cased words, 0.0 when it has none.

    Args:
      completions: N strings, or N chats of which the last message counts.
      solution: N reference answers, or worked solutions ending in one.
      ngram_size: words in an n-gram, at least 1.
      max_penalty: at most 0.
      penalty_scale_factor: at least 0.
      **columns: ignored, so that every data column may be passed.

    Returns:
      N floats.

    Raises:
      ValueError: lengths differ, or a setting is out of its range.
    """
    return good_accuracy_counted(
        completions, solution, ngram_size, max_penalty, penalty_scale_factor
    )[0]


def good_accuracy_counted(
    completions: Completions,
    solution: list,
    ngram_size: int = 4,
    max_penalty: float = -0.5,
    penalty_scale_factor: float = 0.1,
    **columns,
) -> tuple[list[float], int]:
    """As good_accuracy, and how many completions held no answer that could be read."""
    if len(completions) != len(solution):
        raise ValueError(
            f"good_accuracy: {len(completions)} completions but {len(solution)} solutions"
        )
    if ngram_size < 1 or max_penalty > 0 or penalty_scale_factor < 0:
        raise ValueError(
            "good_accuracy: wanted ngram_size >= 1, max_penalty <= 0 and penalty_scale_factor >= 0,"
            f" got {ngram_size}, {max_penalty} and {penalty_scale_factor}"
        )
    scores, unparsed = [], 0
    for text, reference in zip(texts(completions), solution, strict=True):
        answer = find_answer(text)
        right, parsed = compare(answer, find_reference(reference)) if answer else (False, False)
        unparsed += not parsed
        penalty = penalty_scale_factor * max_penalty
        scores.append(1.0 if right else penalty * _repetition(text, ngram_size) or 0.0)
    return scores, unparsed


def _repetition(text: str, ngram_size: int) -> float:
    """1 - distinct n-grams / n-grams, over lower-cased words; 0.0 where there is no n-gram."""
    words = text[: 16 * MAX_NGRAM_WORDS].lower().split(None, MAX_NGRAM_WORDS)[:MAX_NGRAM_WORDS]
    count = len(words) - ngram_size + 1
    if count < 1:
        return 0.0
    distinct = set(zip(*(words[i:] for i in range(ngram_size))))
    return 1.0 - len(distinct) / count
