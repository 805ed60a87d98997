"""Rewards: whether an answer is right, and what else counts.

    with RewardModel([RewardFunction(name="good_accuracy")]) as model:
        scores = model.score(completions, {"solution": solutions})

Nothing here imports JAX or sympy, so that grading workers start quickly and hold no device.
"""

from adpo_jax.rewards.binding import NO_RUN, TrainerState
from adpo_jax.rewards.builtin import exact_match, format_reward, good_accuracy, length_penalty
from adpo_jax.rewards.custom import RewardFunction
from adpo_jax.rewards.errors import RewardError
from adpo_jax.rewards.model import RewardModel
from adpo_jax.rewards.scores import Handle, Scores

__all__ = [
    "NO_RUN",
    "Handle",
    "RewardError",
    "RewardFunction",
    "RewardModel",
    "Scores",
    "TrainerState",
    "exact_match",
    "format_reward",
    "good_accuracy",
    "length_penalty",
]
