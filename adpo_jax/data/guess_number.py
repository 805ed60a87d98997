"""The embedded game: find a number in a few guesses, each answered with "higher" or "lower".

The demonstrations for the supervised cold start guess anywhere in the range that is left, so a
model that imitates them needs many guesses. The reward is the share of guesses that are left.
"""

import functools
import json
import random

from adpo_jax.data import arithmetic, small_chat

NAME = "embedded:guess_number"

LARGEST = 30  # the largest number; the smallest is 1
MOST_GUESSES = 8
NUM_ROWS = {"train": 4096, "val": 120, "demonstrations": 8192}

_SEEDS = {"train": 1, "val": 2, "demonstrations": 3}

# A Hugging Face config.json of 0.66 million parameters.
MODEL_CONFIG = arithmetic.MODEL_CONFIG


def rows(split: str) -> dict[str, list]:
    """The data set as columns: `question`, the same everywhere, and `secret`, the number to find.

    Args:
      split: "train", "val", or "demonstrations" with the column `completion` to imitate.

    Raises:
      ValueError: for another split.
    """
    if split not in _SEEDS:
        raise ValueError(f"{NAME} has the splits {sorted(_SEEDS)}, given {split!r}")
    rng = random.Random(_SEEDS[split])
    count = NUM_ROWS[split]
    secrets = [1 + place % LARGEST for place in range(count)]
    rng.shuffle(secrets)
    columns = {"question": [f"Find the number from 1 to {LARGEST}."] * count, "secret": secrets}
    columns["answer"] = [f"#### {secret}" for secret in secrets]
    if split == "demonstrations":
        columns["completion"] = [_game(secret, rng) for secret in secrets]
    return columns


def _game(secret: int, rng: random.Random) -> str:
    """A transcript whose guesses lie anywhere in what is left, as `small_chat` writes it."""
    low, high, said = 1, LARGEST, ""
    for _ in range(MOST_GUESSES):
        number = rng.randint(low, high)
        call = json.dumps({"name": "guess", "arguments": {"number": number}})
        said += f"{small_chat.OPEN}{call}{small_chat.CLOSE}{small_chat.END}"
        if number == secret:
            return f"{said}<tool>right</tool>#### {number}"
        said += f"<tool>{'higher' if number < secret else 'lower'}</tool>"
        low, high = (number + 1, high) if number < secret else (low, number - 1)
    return f"{said}#### ?"


@functools.cache
def make_tokenizer():
    """The task's tokenizer, with a chat template that has tools."""
    columns = rows("demonstrations")
    texts = columns["question"][:256] + columns["completion"][:2048]
    return small_chat.make_tokenizer(texts, MODEL_CONFIG["vocab_size"])
