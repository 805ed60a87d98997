"""The embedded game of several turns: guess a number that the environment has in mind.

The demonstrations for the supervised cold start play in two manners: most guess anything in the
range, whatever they are told, and fewer halve what is left of it. A model that imitates them seldom
finds the number in time. A reward for the turns that are left makes it halve.
"""

import functools
import json
import random

from adpo_jax.data import arithmetic, small_chat, splits

NAME = "embedded:guess_number"

WIDTH = 15  # numbers in a range: four guesses find any of them
MAX_GUESSES = 6
LOWEST, HIGHEST = 100, 984  # where a range may begin
HALVING_SHARE = 0.25  # of the demonstrations that halve what is left
NUM_ROWS = {"train": 4096, "val": 256, "demonstrations": 8192}
# Questions of each split, so that the ranges of one are those of no other.
NUM_RANGES = {"train": 256, "val": 64, "demonstrations": 512}

# A Hugging Face config.json of 0.66 million parameters.
MODEL_CONFIG = arithmetic.MODEL_CONFIG


@functools.cache
def rows(split: str) -> dict[str, list]:
    """The data set as columns: `question`, and the `secret` number.

    Args:
      split: "train" or "val" (disjoint), or "demonstrations": ranges apart from both, with the
        column `completion` to imitate.

    Raises:
      ValueError: for another split.
    """
    held_out = splits.held_out(NAME, split, rows)
    rng = random.Random(splits.SEEDS[split])
    lows: dict[str, int] = {}
    while len(lows) < NUM_RANGES[split]:
        low = rng.randint(LOWEST, HIGHEST)
        question = f"Which number from {low} to {low + WIDTH - 1}?"
        if question not in held_out:
            lows[question] = low
    questions = [rng.choice(list(lows)) for _ in range(NUM_ROWS[split])]
    secrets = [lows[question] + rng.randrange(WIDTH) for question in questions]
    columns = {"question": questions, "secret": secrets}
    if split == "demonstrations":
        columns["completion"] = [
            _game(lows[question], secret, rng) for question, secret in zip(questions, secrets)
        ]
    return columns


def _game(low: int, secret: int, rng: random.Random) -> str:
    """The transcript of a game, as `small_chat` writes it."""
    halves = rng.random() < HALVING_SHARE
    first, last, said = low, low + WIDTH - 1, ""
    for _ in range(MAX_GUESSES):
        guess = (first + last) // 2 if halves else rng.randint(low, low + WIDTH - 1)
        call = json.dumps({"name": "guess", "arguments": {"number": guess}})
        said += f"{small_chat.OPEN}{call}{small_chat.CLOSE}{small_chat.END}"
        if guess == secret:
            return f"{said}<tool>right</tool>#### {guess}"
        said += f"<tool>{'higher' if guess < secret else 'lower'}</tool>"
        first, last = (guess + 1, last) if guess < secret else (first, guess - 1)
    return f"{said}####"


@functools.cache
def make_tokenizer():
    """The task's tokenizer, with a chat template that has tools."""
    columns = rows("demonstrations")
    texts = columns["question"][:2048] + columns["completion"][:2048]
    return small_chat.make_tokenizer(texts, MODEL_CONFIG["vocab_size"])
