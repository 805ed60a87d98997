"""A reward that is wrong at a known rate, to see what noise in the grading does to a loss.

    --config.custom_reward_function.path=scripts/flipped_verdicts.py \\
    --config.custom_reward_function.name=flipped_accuracy \\
    --config.reward_model.reward_kwargs="{'rate': 0.2}"
"""

import collections
import hashlib

from adpo_jax.rewards import good_accuracy


def flipped_accuracy(completions, solution, *, rate=0.2, **columns):
    """1.0 for a right answer and 0.0 for a wrong one, the other way round at the given rate.

    Which verdicts are flipped depends on the solution, the text, and how many like it came before
    in the same call: equal completions of a group are flipped each for itself, and a run that is
    repeated flips the same ones.

    Args:
      rate: the share of verdicts that are flipped, 0 to 1.
    """
    rewards, before = [], collections.Counter()
    for one in zip(completions, solution, good_accuracy(completions, solution)):
        text, answer, reward = one
        key = f"{answer}\n{text}"
        digest = hashlib.sha256(f"{before[key]}\n{key}".encode()).digest()
        before[key] += 1
        is_flipped = int.from_bytes(digest[:8], "big") < rate * 2**64
        rewards.append(float((reward > 0) != is_flipped))
    return rewards
