"""The ready rewards. Each takes completions as strings or as chat messages."""

import re

from adpo_jax.rewards.grading.compare import compare
from adpo_jax.rewards.grading.extract import find_answer, find_reference
from adpo_jax.rewards.grading.limits import MAX_NGRAM_WORDS
from adpo_jax.rewards.grading.linear_regex import compile_linear

_SPACES = re.compile(r"(?<!\w) | (?!\w)")

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
    _same_length("good_accuracy", completions, solution)
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


def exact_match(completions: Completions, solution: list, **columns) -> list[float]:
    """1.0 where the answer found reads like the reference but for spaces, else 0.0.

    Args:
      completions: N strings, or N chats of which the last message counts.
      solution: N reference answers, or worked solutions ending in one.
      **columns: ignored.
    """
    _same_length("exact_match", completions, solution)
    scores = []
    for text, reference in zip(texts(completions), solution, strict=True):
        answer = find_answer(text)
        same = answer and _without_spaces(answer) == _without_spaces(find_reference(reference))
        scores.append(1.0 if same else 0.0)
    return scores


def _without_spaces(text: str) -> str:
    """A text without the spaces that part no letters or digits: `x + 1` is `x+1`."""
    return _SPACES.sub("", " ".join(text.split()))


THINK_THEN_ANSWER = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*"


def format_reward(
    completions: Completions, pattern: str = THINK_THEN_ANSWER, **columns
) -> list[float]:
    """1.0 where the whole completion matches a pattern, else 0.0, in linear time.

    Args:
      completions: N strings, or N chats of which the last message counts.
      pattern: a regular expression without lookaround and backreferences (see
        `linear_regex.LinearRegex`); `.` matches newlines too.
      **columns: ignored.

    Raises:
      ValueError: the pattern cannot be matched in linear time, or is malformed.
    """
    automaton = compile_linear(pattern)
    return [float(automaton.fullmatch(text)) for text in texts(completions)]


def length_penalty(
    completions: Completions,
    completion_tokens: list[int] | None = None,
    max_length: int = 1024,
    buffer_length: int = 256,
    **columns,
) -> list[float]:
    """DAPO's soft overlong penalty: 0 for a completion short enough, down to -1 at max_length.

    0 up to `max_length - buffer_length` tokens, then falling linearly to -1 at `max_length`, and -1
    beyond.

    Args:
      completions: N completions.
      completion_tokens: their lengths in tokens, which the training loop passes.
      max_length: the length from which on the penalty is -1, in tokens.
      buffer_length: over how many tokens it grows, 1 to max_length.
      **columns: ignored.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476, equation 13.
    """
    if not 1 <= buffer_length <= max_length:
        raise ValueError(
            "length_penalty: wanted 1 <= buffer_length <= max_length, "
            f"got {buffer_length} and {max_length}"
        )
    if completion_tokens is None:
        raise ValueError(
            "length_penalty needs the column completion_tokens, one length a completion"
        )
    _same_length("length_penalty", completions, completion_tokens)
    start = max_length - buffer_length
    return [-min(max((n - start) / buffer_length, 0.0), 1.0) or 0.0 for n in completion_tokens]


def _same_length(name: str, completions: Completions, column: list) -> None:
    if len(completions) != len(column):
        raise ValueError(
            f"{name}: {len(completions)} completions but {len(column)} values for them"
        )


# The columns that each takes, so that no others are sent to the workers.
COLUMNS = {
    "good_accuracy": ("solution",),
    "exact_match": ("solution",),
    "format_reward": (),
    "length_penalty": ("completion_tokens",),
    "reasoning_gym": ("reasoning_gym",),
}
