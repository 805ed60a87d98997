"""Groups that teach the policy to be brief, not right.

Where no completion of a group is right, the rewards differ by small penalties alone, and a target
from standardised rewards scales them up like any others. A penalty that short texts escape, such as
good_accuracy's for repetition, then makes saying nothing the best answer (docs/rewards.md).
"""

import numpy as np
from absl import logging

from adpo_jax.records import GradedGroups
from adpo_jax.rollouts.filtering import has_spread

WARNED_SHARE = 0.25


@np.errstate(invalid="ignore")  # rewards that are not finite prefer nothing
def silence_preferred_frac(
    rewards_PG: np.ndarray, lengths_PG: np.ndarray, min_reward_std: float = 0.0
) -> float:
    """The share of groups that are trained on, in which silence is the best of the wrong answers.

    Such a group's rewards are all 0 or less, their standard deviation (ddof=1) is above 0 and at
    least `min_reward_std`, and its best completions are on average less than half as long as its
    median completion.

    Args:
      rewards_PG: [P, G] float32.
      lengths_PG: [P, G] int, tokens of each completion.
    """
    best_PG = rewards_PG == rewards_PG.max(axis=1, keepdims=True)
    trained_P = has_spread(rewards_PG, min_reward_std)
    wrong_P = (rewards_PG <= 0).all(axis=1)
    length_P = (lengths_PG * best_PG).sum(axis=1) / np.maximum(best_PG.sum(axis=1), 1)
    is_brief_P = length_P < 0.5 * np.median(lengths_PG, axis=1)
    return float(np.mean(trained_P & wrong_P & is_brief_P))


class SilenceWatch:
    """Measures the share of such groups in each iteration, and warns once.

    Args:
      min_reward_std: a group whose rewards have a smaller standard deviation is not trained on.
      is_off: whether nothing is measured: where groups without a reward above 0 are not trained
        on, or a teacher takes the place of rewards.
    """

    def __init__(self, *, min_reward_std: float, is_off: bool):
        self._min_reward_std, self._is_off = min_reward_std, is_off
        self._has_warned = False

    def metrics(self, groups: GradedGroups) -> dict[str, float]:
        """The metric of an iteration's groups."""
        share = 0.0
        if not self._is_off:
            share = silence_preferred_frac(
                groups.rewards, groups.completions.lengths, self._min_reward_std
            )
        if share >= WARNED_SHARE and not self._has_warned:
            self._has_warned = True
            logging.warning(
                "in %.0f%% of the groups no answer is right and the best rewards go to completions "
                "of less than half the usual length, so the policy learns to say little: set "
                "algorithm.min_reward_std=0.05 or "
                "reward_model.reward_kwargs=\"{'max_penalty': 0.0}\" "
                "(docs/rewards.md, metric groups/silence_preferred_frac)",
                100 * share,
            )
        return {"groups/silence_preferred_frac": share}
