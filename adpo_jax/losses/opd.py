"""On-policy distillation: a teacher judges every token of the policy's own samples.

Letters: P prompts, G completions of a prompt.

Sources: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (GKD), arXiv 2306.13649;
Lu 2025, "On-Policy Distillation", thinkingmachines.ai/blog/on-policy-distillation.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Metric, Prepared
from adpo_jax.losses.grpo import Clipped
from adpo_jax.losses.parameters import parameter, with_default
from adpo_jax.losses.tokens import Tokens


def _of_reverse_kl(name: str) -> Any:
    """A parameter of the clip, which the other divergences have not."""
    field = with_default(Clipped, name, Clipped.__dataclass_fields__[name].default)
    needs = {"distillation_loss": "reverse_kl"}
    return dataclasses.field(default=field.default, metadata=field.metadata | {"needs": needs})


@dataclass(frozen=True)
class Opd(Clipped):
    """On-policy distillation: the policy's own samples, and a teacher's word on each token.

        reverse_kl   A = teacher log-prob - anchor log-prob of the token that was sampled
                     objective = mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        jsd          objective = mean of JSD at every token, over the whole vocabulary
                     JSD = b KL(teacher || m) + (1 - b) KL(policy || m),  b = jsd_beta
                     m = b teacher + (1 - b) policy

    The gradient of reverse_kl is that of an estimate of KL(policy || teacher), one token at a time.
    The JSD has the gradient of whole distributions, but not through the choice of the tokens; it is
    KL(teacher || policy) at jsd_beta 0 and KL(policy || teacher) at 1. Rewards are graded and
    logged, and have no part in the objective.

    Raises ValueError for a parameter that cannot work.
    """

    name: ClassVar[str] = "opd"
    needs_teacher: ClassVar[bool] = True
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        *Clipped.own_metrics,
        Metric(
            "divergence",
            "tokens",
            "how far policy and teacher are apart: under reverse_kl the mean of anchor log-prob - "
            "teacher log-prob, under jsd the JSD",
            unit="nats a token",
            title="Divergence from the teacher",
        ),
    )

    distillation_loss: str = parameter(
        "reverse_kl",
        "whether a token counts by the teacher's log-prob of it (reverse_kl), or by the divergence "
        "of the whole distributions at its place (jsd)",
        choices=("reverse_kl", "jsd"),
    )
    jsd_beta: float = parameter(
        0.5,
        "the teacher's weight in the mixture that the JSD compares with; 0 is KL(teacher || "
        "policy), 1 is KL(policy || teacher)",
        least=0.0,
        most=1.0,
        needs={"distillation_loss": "jsd"},
    )
    clip_low: float = _of_reverse_kl("clip_low")
    clip_high: float = _of_reverse_kl("clip_high")
    dual_clip: float | None = _of_reverse_kl("dual_clip")

    def __post_init__(self):
        super().__post_init__()
        if self.decouples_rewards:
            raise ValueError(
                "multi_objective_aggregation='normalize_then_sum' has no effect under opd, where "
                "rewards have no part; leave it at 'sum_then_normalize'"
            )

    @property
    def needs(self) -> frozenset[str]:
        teacher = {"teacher"} if self.distillation_loss == "reverse_kl" else set()
        return super().needs | teacher

    @property
    def reads_absolute_log_probs(self) -> bool:
        return self.distillation_loss == "reverse_kl"

    @property
    def teacher_beta(self) -> float | None:
        return self.jsd_beta if self.distillation_loss == "jsd" else None

    def score(
        self,
        rewards_PG: jax.Array,
        *,
        entropy_P: jax.Array | None = None,
        lengths_PG: jax.Array | None = None,
    ) -> shared.Advantages:
        """Which prompts are kept; the advantages, of the rewards, have no part in the loss."""
        return self.advantages(rewards_PG, "none", eps=0.0)

    def objective(
        self,
        log_ratio: jax.Array,
        tokens: Tokens,
        prepared: Prepared,
        log_probs: Mapping[str, jax.Array],
    ):
        """The divergence from the teacher; arguments as of `Algorithm.objective`.

        `log_probs` has that of the "teacher" under reverse_kl, and under jsd the "divergence" at
        each token, into which the gradient flows.
        """
        if self.distillation_loss == "reverse_kl":
            advantages = jax.lax.stop_gradient(
                shared.log_ratios(log_probs["teacher"], log_probs["anchor"], tokens.trained)
            )
            gain, is_clipped = self.gain(log_ratio, advantages, tokens, log_probs)
            apart = -advantages
        else:
            if "divergence" not in log_probs:
                raise ValueError(
                    "distillation_loss='jsd' needs the divergence at each token: pass `divergence` "
                    "too, as `token_divergences` finds it"
                )
            apart = jnp.where(tokens.trained, log_probs["divergence"], 0.0)
            gain, is_clipped = -apart, jnp.zeros_like(tokens.trained)
        loss = -(self.token_weights(tokens, prepared) * tokens.sum(gain)).sum()
        token_P = prepared.weights.token_P
        return loss, {
            "clip_frac": (token_P * tokens.sum(is_clipped.astype(gain.dtype)).sum(-1)).sum(),
            "divergence": (token_P * tokens.sum(apart).sum(-1)).sum(),
        }
