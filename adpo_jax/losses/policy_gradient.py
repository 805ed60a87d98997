"""The frame of the losses that weigh each token by the advantage of its completion.

Letters: P prompts, G completions of a prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Algorithm, Metric, Prepared
from adpo_jax.losses.parameters import parameter, scale_rewards_parameter
from adpo_jax.losses.tokens import Tokens

# Added to the standard deviation that rewards are divided by. The value is verl's; TRL adds 1e-4.
EPS = 1e-6


@dataclass(frozen=True)
class PolicyGradient(Algorithm):
    """A loss whose tokens are each worth a `gain`, which an algorithm defines.

    objective = - the mean of the gains over the tokens, by loss_aggregation
    """

    on_policy_anchor: ClassVar[bool] = True
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "loss",
            "kept tokens",
            "the surrogate alone; unless loss_aggregation is token-mean a mean over groups",
        ),
        Metric(
            "clip_frac",
            "tokens",
            "of tokens whose gradient the clip changed",
            unit="share",
            title="Clipped tokens",
        ),
    )

    loss_aggregation: str = parameter(
        "token-mean",
        "the mean over all tokens of the batch, or over completions of the mean over their tokens, "
        "or over completions of the sum over their tokens by a constant length",
        choices=("token-mean", "sequence-mean", "constant"),
    )
    constant_length: int | None = parameter(
        None,
        "the tokens that a completion's sum is divided by; None for data.max_response_length",
        above=0,
        needs={"loss_aggregation": "constant"},
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """As of `Algorithm`; `loss_aggregation` says what the loss is a mean over."""
        if self.loss_aggregation == "token-mean":
            return super().metrics
        return tuple(
            metric._replace(over="kept groups") if metric.name == self.loss_metric else metric
            for metric in super().metrics
        )

    def gain(
        self,
        log_ratio: jax.Array,
        advantages: jax.Array,
        tokens: Tokens,
        log_probs: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """What each token is worth, and whether the clip changed its gradient.

        Args:
          log_ratio, tokens, log_probs: as for `objective`.
          advantages: those of the tokens' completions, in the shape of the tokens.
        """
        raise NotImplementedError

    def objective(
        self,
        log_ratio: jax.Array,
        tokens: Tokens,
        prepared: Prepared,
        log_probs: Mapping[str, jax.Array],
    ):
        """The mean of the gains, taken off; arguments as of `Algorithm.objective`."""
        advantages = tokens.spread(prepared.scores.advantages_PG)
        gain, is_clipped = self.gain(log_ratio, advantages, tokens, log_probs)
        loss = -(self.token_weights(tokens, prepared) * tokens.sum(gain)).sum()
        is_clipped &= advantages != 0  # else there is no gradient to change
        clipped_P = tokens.sum(is_clipped.astype(gain.dtype)).sum(-1)
        return loss, {"clip_frac": (prepared.weights.token_P * clipped_P).sum()}

    def token_weights(self, tokens: Tokens, prepared: Prepared) -> jax.Array:
        """The weight of a token of each completion, [P, G] or [P, 1], by `loss_aggregation`."""
        if self.loss_aggregation == "token-mean":
            return super().token_weights(tokens, prepared)
        if self.loss_aggregation == "sequence-mean":
            lengths_PG = shared.lengths(tokens)
        else:
            lengths_PG = self.constant_length or tokens.width
        group_size = prepared.scores.advantages_PG.shape[1]
        return prepared.weights.kept_group_P[:, None] / (group_size * lengths_PG)


@dataclass(frozen=True)
class GroupRelative(PolicyGradient):
    """A `PolicyGradient` whose advantages are rewards standardised within their group.

    A_i = (R_i - group mean) / (std + 1e-6)
    """

    scale_rewards: str = scale_rewards_parameter()

    def score(
        self,
        rewards_PG: jax.Array,
        *,
        entropy_P: jax.Array | None = None,
        lengths_PG: jax.Array | None = None,
    ) -> shared.Advantages:
        """Advantages from the rewards, [P, G], of the whole iteration."""
        return self.advantages(rewards_PG, self.scale_rewards, EPS)
