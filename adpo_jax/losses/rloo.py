"""REINFORCE leave-one-out, a baseline.

Letters: P prompts, G completions of a prompt.

Source: Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740, section 3.2, after Kool, van Hoof
and Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
"""

from dataclasses import dataclass
from typing import ClassVar

import jax

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Algorithm, Metric, Prepared
from adpo_jax.losses.tokens import Tokens


@dataclass(frozen=True)
class Rloo(Algorithm):
    """REINFORCE with the mean reward of the other completions of the prompt as its baseline.

        A_i = R_i - mean of R_j over j != i  =  G / (G - 1) * (R_i - group mean)
        objective = mean over completions of -A_i (s_i - s_anchor_i)

    The penalties of `Algorithm` are added, as means over tokens. s_i is the log-probability of the
    whole completion. The anchor shifts the value of the objective, which is 0 on policy, but not
    its gradient, -A_i grad s_i. Later optimizer steps on the same completions are not corrected for
    having left the policy that sampled.

    Raises ValueError for a parameter that cannot work.
    """

    name: ClassVar[str] = "rloo"
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "loss",
            "kept groups",
            "the REINFORCE term; 0 on one optimizer step under the on-policy anchor",
        ),
    )

    def score(
        self,
        rewards_PG: jax.Array,
        *,
        entropy_P: jax.Array | None = None,
        lengths_PG: jax.Array | None = None,
    ) -> shared.Advantages:
        """Advantages from the rewards, [P, G], of the whole iteration."""
        scores = self.advantages(rewards_PG, "none", eps=0.0)
        G = scores.advantages_PG.shape[1]
        return scores._replace(advantages_PG=scores.advantages_PG * (G / (G - 1)))

    def objective(self, log_ratio: jax.Array, tokens: Tokens, prepared: Prepared, log_probs):
        """The REINFORCE term; arguments as of `Algorithm.objective`."""
        reinforce_P = (prepared.scores.advantages_PG * tokens.sum(log_ratio)).mean(-1)
        return -(prepared.weights.kept_group_P * reinforce_P).sum(), {}
