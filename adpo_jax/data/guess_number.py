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

LARGEST = 15  # of the numbers, from 1: four guesses find any of them
MAX_GUESSES = 6
HALVING_SHARE = 0.25  # of the demonstrations that halve what is left
NUM_ROWS = {"train": 4096, "val": 256, "demonstrations": 8192}
NAMES = ("Ann", "Ben", "Cem", "Dan", "Eva", "Fay", "Gus", "Ida", "Jan", "Kim", "Leo", "Mia", "Noa")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# A Hugging Face config.json of 0.66 million parameters.
MODEL_CONFIG = arithmetic.MODEL_CONFIG


@functools.cache
def rows(split: str) -> dict[str, list]:
    """The data set as columns: `question`, and the `secret` number.

    Args:
      split: "train" or "val" (disjoint), or "demonstrations": questions apart from both, with the
        column `completion` to imitate.

    Raises:
      ValueError: for another split.
    """
    held_out = splits.held_out(NAME, split, rows)
    rng = random.Random(splits.SEEDS[split])
    games: dict[str, int] = {}
    while len(games) < NUM_ROWS[split]:
        name = f"{rng.choice(NAMES)} {rng.choice(LETTERS)}{rng.choice(LETTERS)}{rng.randint(1, 9)}"
        question = f"{name} thinks of a number from 1 to {LARGEST}."
        if question not in held_out:
            games[question] = rng.randint(1, LARGEST)
    columns = {"question": list(games), "secret": list(games.values())}
    if split == "demonstrations":
        columns["completion"] = [_game(secret, rng) for secret in games.values()]
    return columns


def _game(secret: int, rng: random.Random) -> str:
    """The transcript of a game, as `small_chat` writes it."""
    halves = rng.random() < HALVING_SHARE
    first, last, said = 1, LARGEST, ""
    for _ in range(MAX_GUESSES):
        guess = (first + last) // 2 if halves else rng.randint(1, LARGEST)
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
