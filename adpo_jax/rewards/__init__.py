"""Rewards: is the answer right, and what else should count.

    with RewardModel([RewardFunction(name="good_accuracy")]) as model:
        scores = model.score(completions, {"solution": solutions})

Nothing here imports JAX or sympy, so that grading workers start quickly and hold no device.
"""

from adpo_jax.rewards.builtin import good_accuracy
from adpo_jax.rewards.custom import RewardFunction
from adpo_jax.rewards.errors import RewardError
from adpo_jax.rewards.model import RewardModel, Scores

__all__ = ["RewardError", "RewardFunction", "RewardModel", "Scores", "good_accuracy"]
