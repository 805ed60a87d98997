"""The embedded task with a tool: sums of numbers that are too large for the small model.

The demonstrations for the supervised cold start answer in two manners: most blurt out a number of
about the right size, fewer have the tool `add` do the sum and repeat what it answers. A model that
imitates them prefers to blurt. Rewarding right answers makes it use the tool.
"""

import functools
import json
import random

from adpo_jax.data import arithmetic, small_chat, splits

NAME = "embedded:calculator"

SMALLEST, LARGEST = 1_000, 9_999  # of the numbers to add
TOOL_SHARE = 0.3  # of the demonstrations that use the tool
NUM_ROWS = {"train": 8192, "val": 256, "demonstrations": 8192}

# A Hugging Face config.json of 0.66 million parameters.
MODEL_CONFIG = arithmetic.MODEL_CONFIG


@functools.cache
def rows(split: str) -> dict[str, list[str]]:
    """The data set as columns: `question`, and `answer` as "#### N".

    Args:
      split: "train" or "val" (disjoint), or "demonstrations": questions apart from both, with the
        column `completion` to imitate.

    Raises:
      ValueError: for another split.
    """
    held_out = splits.held_out(NAME, split, rows)
    rng = random.Random(splits.SEEDS[split])
    pairs: dict[str, tuple[int, int]] = {}
    while len(pairs) < NUM_ROWS[split]:
        a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
        question = f"What is {a} + {b}?"
        if question not in held_out:
            pairs[question] = a, b
    columns = {"question": list(pairs), "answer": [f"#### {a + b}" for a, b in pairs.values()]}
    if split == "demonstrations":
        columns["completion"] = [
            _with_tool(a, b) if rng.random() < TOOL_SHARE else _blurted(a + b, rng)
            for a, b in pairs.values()
        ]
    return columns


def _with_tool(a: int, b: int) -> str:
    """A transcript of two turns, as `small_chat` writes it."""
    call = json.dumps({"name": "add", "arguments": {"a": a, "b": b}})
    turn = f"{small_chat.OPEN}{call}{small_chat.CLOSE}{small_chat.END}"
    return f"{turn}<tool>{a + b}</tool>#### {a + b}"


def _blurted(total: int, rng: random.Random) -> str:
    """A wrong result of the right size."""
    wrong = total + rng.choice((-1, 1)) * rng.randint(1, 999)
    return f"#### {wrong}"


@functools.cache
def make_tokenizer():
    """The task's tokenizer, with a chat template that has tools."""
    columns = rows("demonstrations")
    texts = columns["question"][:2048] + columns["completion"][:2048]
    return small_chat.make_tokenizer(texts, MODEL_CONFIG["vocab_size"])
