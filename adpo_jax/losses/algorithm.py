"""The declarations of an algorithm, and the frame of the loss that all algorithms share.

An algorithm is a frozen dataclass. Its fields are its parameters, each declared by
`parameters.parameter` with its default, its meaning and its bounds. Config keys, their
documentation and the refusals of keys without effect are made from these declarations. An algorithm
also declares its metrics, with how each is averaged, and the log-probs that it needs. Nothing else
in the package tells algorithms apart.

A new algorithm defines `score` (what the rewards alone decide) and `objective` (its own term of the
loss, from log-ratios), and has a line in the table `losses.ALGORITHMS`. The frame adds what every
loss may have: the pull to the anchor and to the reference, the correction for a sampler that is not
the trainer's policy, and the entropy bonus.

Letters: B rows of streams or prompts, P prompts, G completions of a prompt, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.losses import parameters, shared
from adpo_jax.losses.parameters import OFF, SET, parameter
from adpo_jax.losses.shared import Metrics, Normalisers
from adpo_jax.losses.tokens import Tokens

# The log-probs that a loss may be given, and whose they are.
LOG_PROBS = {
    "policy": "the policy that is trained",
    "anchor": "the policy that log-ratios are measured against, by anchor.mode",
    "sampler": "the sampler, as it drew the tokens; not truncated",
    "reference": "the policy before the first iteration or one of a folder, which never moves",
    "teacher": "the policy of a folder that the policy learns from",
}


# Weights above exp(20) = 5e8 count as so much, lest they overflow.
_LARGEST_LOG_WEIGHT = 20.0

# How the values of a metric at optimizer steps become one value of the iteration.
OVER = {
    "tokens": "a mean over tokens",
    "groups": "a mean over groups",
    "kept tokens": "a mean over the tokens of prompts that were kept",
    "kept groups": "a mean over the groups that were kept",
    "steps": "a mean over optimizer steps",
    "sum": "a sum",
    "first": "that of the first optimizer step",
}


class Metric(NamedTuple):
    """A number that is logged.

    Attributes:
      name: its name; a metric of an algorithm is logged below the algorithm's name and a slash.
      over: how it is averaged, one of `OVER`.
      meaning: its meaning for the documentation, without a full stop.
      unit: its unit; "" for a plain number.
      title: the title of its picture in reports; "" for no picture.
      needs: the parameter that it is logged with; "" if it is always logged.
    """

    name: str
    over: str
    meaning: str
    unit: str = ""
    title: str = ""
    needs: str = ""


REFERENCE_KL = Metric(
    "reference_kl",
    "kept tokens",
    "KL to the reference (kl_estimator), before beta_reference_kl",
    unit="nats a token",
    title="KL to the reference",
    needs="beta_reference_kl",
)
CORRECTION = (
    Metric(
        "sampler_weight",
        "tokens",
        "of tokens, their weight for a sampler that is not the trainer's policy",
        needs="sampler_correction",
    ),
    Metric(
        "sampler_clip_frac",
        "tokens",
        "of tokens whose weight was beyond correction_cap",
        unit="share",
        needs="sampler_correction",
    ),
)
SHARED_METRICS = (
    Metric("loss", "groups", "the objective, without the penalties"),
    Metric(
        "anchor_kl",
        "tokens",
        "k3 estimate of the KL between policy and anchor, before each optimizer step",
        unit="nats a token",
        title="KL to the anchor",
    ),
    Metric(
        "abs_log_ratio",
        "groups",
        "mean of the absolute log-ratio of whole completions to the anchor",
        unit="nats a completion",
    ),
    Metric(
        "kl_penalty",
        "kept tokens",
        "k3 to the anchor, before beta_anchor_kl",
        unit="nats a token",
    ),
    REFERENCE_KL,
    *CORRECTION,
    Metric(
        "entropy_bonus",
        "kept tokens",
        "entropy of the policy, before the factor entropy_bonus",
        unit="nats",
        needs="entropy_bonus",
    ),
    Metric("dropped_prompts", "sum", "taken out by drop_all_failed_prompts", unit="prompts"),
    Metric(
        "zero_std_frac",
        "groups",
        "of groups whose rewards count as all equal by min_reward_std",
        unit="share",
    ),
)


class Prepared(NamedTuple):
    """The input of `loss` besides log-probs. Every leaf has one row a prompt.

    Attributes:
      scores: the result of `score`; it has at least the fields `kept_P` and `spread_P`.
      weights: the normalisers of an optimizer step.
    """

    scores: Any
    weights: Normalisers


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The frame of a loss over groups of completions.

        loss = objective + beta_anchor_kl * k3(anchor) + beta_reference_kl * kl(reference)
                         - entropy_bonus * entropy
        k3 = exp(d) - d - 1 per token,   d = log-prob of the other policy - log-prob of the policy

    The anchor is the policy that log-ratios are measured against (under `anchor.mode=on_policy` the
    policy before the iteration's updates). The reference is the policy before the first iteration,
    or one of a folder.

    Where the sampler is not the policy before the update (its cache is narrower, say), the
    expectation that the objective estimates is taken over the wrong policy. `sampler_correction`
    weighs the gradient of every token by

        w = exp(anchor log-prob - sampler log-prob)    of the token, or of the whole completion

    and above `correction_cap` it cuts the weight ("truncate") or takes the token out ("mask"). The
    weight acts on the objective alone, not on the penalties, and on its gradient alone: the loss
    keeps its value.

    An update calls its pieces:

        judge      makes one reward a completion of several and calls `score`, over the iteration
        score      finds what the rewards alone decide (targets, advantages)
        normalise  finds the normalisers (1 / kept groups, 1 / kept tokens) of one optimizer step
        loss       sums over any part of the batch that has whole groups. The sums of the parts add
                   up to the loss and metrics of the batch exactly, since every normaliser is
                   already folded in

    `prepare` calls `judge` and `normalise`, for an iteration of one batch (`losses.flat`).

    Raises ValueError for a parameter that cannot work.
    """

    # The name of the class is its name in the config and before the slash of its metrics.
    name: ClassVar[str]
    # Metrics of `objective`, and those of `SHARED_METRICS` that have another meaning here.
    own_metrics: ClassVar[tuple[Metric, ...]] = ()
    # Whether its log-ratios must be to the policy that sampled: anchor.mode on_policy or sampler.
    on_policy_anchor: ClassVar[bool] = False
    # Whether the objective reads log-probs too, and not their differences alone.
    reads_absolute_log_probs: ClassVar[bool] = False
    # Whether it learns from another policy, the teacher.
    needs_teacher: ClassVar[bool] = False

    beta_anchor_kl: float = parameter(0.0, "coefficient of the k3 penalty to the anchor", least=0.0)
    beta_reference_kl: float = parameter(
        0.0,
        "coefficient of the penalty to the reference (kl_estimator), the policy before the first "
        "iteration or "
        "that of actor_rollout_ref.ref.path",
        least=0.0,
    )
    kl_estimator: str = parameter(
        "k3",
        "estimate of the KL to the reference from a token's log-ratio d: -d, d^2 / 2 or "
        "exp(d) - d - 1",
        choices=tuple(shared.KL_ESTIMATORS),
        needs={"beta_reference_kl": SET},
    )
    sampler_correction: str = parameter(
        "auto",
        "tokens are weighted by their probability under trainer and sampler; a weight above "
        "correction_cap is cut there, or takes its token out of the objective. auto is truncate "
        "under the anchor on_policy where the sampler's cache is narrower than the trainer's "
        "numbers or samples may be old, else none",
        choices=("auto", "none", "truncate", "mask"),
    )
    correction_level: str = parameter(
        "token",
        "whether a weight is of a token or of its whole completion",
        choices=("token", "sequence"),
        needs={"sampler_correction": SET},
    )
    correction_cap: float = parameter(
        2.0, "the largest weight", above=0.0, needs={"sampler_correction": SET}
    )
    entropy_bonus: float = parameter(
        0.0, "coefficient of the mean token entropy, which is taken off the loss", least=0.0
    )
    drop_all_failed_prompts: bool = parameter(
        False, "prompts whose rewards are all <= 0 leave the loss"
    )
    min_reward_std: float = parameter(
        0.0,
        "a group whose rewards have a smaller standard deviation counts as all equal",
        least=0.0,
    )
    multi_objective_aggregation: str = parameter(
        "sum_then_normalize",
        "of several reward functions: their weighted sum is scaled by scale_rewards, or each is "
        "standardised within its group before the weighted sum, which is then divided by the "
        "standard deviation of the batch (normalize_then_sum, GDPO)",
        choices=("sum_then_normalize", "normalize_then_sum"),
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for metric in cls.own_metrics:
            shared.check_choice(f"over, of the metric {metric.name},", metric.over, tuple(OVER))

    def __post_init__(self):
        parameters.check(self)

    @property
    def needs(self) -> frozenset[str]:
        """The names in `LOG_PROBS` of those that the loss reads beside the policy's own."""
        reference = {"reference"} if self.beta_reference_kl else set()
        sampler = {"sampler"} if self.corrects else set()
        return frozenset({"anchor"} | reference | sampler)

    @property
    def corrects(self) -> bool:
        """Whether tokens are weighted for a sampler that is not the trainer's policy."""
        return self.sampler_correction not in OFF

    @property
    def teacher_beta(self) -> float | None:
        """The beta of `token_divergences`, where the objective reads divergences from the teacher.

        They are then in `log_probs` of `objective`, as "divergence"; None where it reads none.
        """
        return None

    @property
    def slope_is_known(self) -> bool:
        """Whether the slope of the loss is known beforehand where the policy is its own anchor.

        Every log-ratio is 0 then, whatever the log-probs are.
        """
        return self.needs <= {"anchor"} and not self.reads_absolute_log_probs

    @property
    def needs_entropy(self) -> bool:
        """Whether `score` needs the anchor policy's entropy on each prompt."""
        return False

    @classmethod
    def declared_metrics(cls) -> tuple[Metric, ...]:
        """All metrics that it may log, by short names."""
        return tuple({m.name: m for m in (*SHARED_METRICS, *cls.own_metrics)}.values())

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that it logs with its present parameters, by whole names."""
        return tuple(
            metric._replace(name=f"{self.name}/{metric.name}")
            for metric in self.declared_metrics()
            if not metric.needs or getattr(self, metric.needs) not in OFF
        )

    @property
    def loss_metric(self) -> str:
        """The name of the loss among the metrics; where it is not finite, the step is not sound."""
        return f"{self.name}/loss"

    @property
    def anchor_kl_metric(self) -> str:
        """The name of the measured KL to the anchor among the metrics."""
        return f"{self.name}/anchor_kl"

    def score(
        self,
        rewards_PG: jax.Array,
        *,
        entropy_P: jax.Array | None = None,
        lengths_PG: jax.Array | None = None,
    ) -> Any:
        """What the rewards of the whole iteration decide (targets, advantages), without gradient.

        Args:
          rewards_PG: [P, G], one a completion; G >= 2.
          entropy_P: [P] in [0, 1], the mean token entropy of the anchor policy on each prompt over
            log(vocabulary size); given where the algorithm `needs_entropy`.
          lengths_PG: [P, G], trained tokens of each completion; None counts completions alike where
            an algorithm would weigh them by their tokens.

        Returns:
          A NamedTuple whose leaves have one row a prompt. Two of them are bool [P]: `kept_P` is
          False where drop_all_failed_prompts took the prompt out, `spread_P` where the rewards of
          the group count as all equal.
        """
        raise NotImplementedError

    @property
    def decouples_rewards(self) -> bool:
        """Whether `judge` wants each reward function's own rewards, and not their weighted sum."""
        return self.multi_objective_aggregation == "normalize_then_sum"

    def judge(self, rewards: jax.Array, weights: Any = None, **context) -> Any:
        """`score`, of one reward a completion or of several.

        Several are each standardised before they are summed where the algorithm
        `decouples_rewards`, so that each keeps its say whatever its scale is:

            z_k = (r_k - group mean) / (std of the group + 1e-6)     0 where a group's are all equal
            score of sum_k w_k z_k / (std over the batch + 1e-6), not scaled again

        `min_reward_std` then holds for each of them, and `drop_all_failed_prompts` for the weighted
        sum of the rewards themselves.

        Args:
          rewards: [P, G], one a completion; or [P, G, K], K of them, NaN where a function gave a
            completion none.
          weights: [K], the weight of each; None for 1.
          context: further arguments of `score`.

        Raises:
          ValueError: for rewards or weights of another shape than the algorithm takes.

        Source: Liu et al. 2026, "GDPO", arXiv 2601.05242.
        """
        rewards = jnp.asarray(rewards).astype(jnp.result_type(float))
        if rewards.ndim != 3:
            if self.decouples_rewards:
                raise ValueError(
                    "multi_objective_aggregation='normalize_then_sum' needs the rewards of each "
                    f"function, [P, G, K] or in a flat batch [B, K], got shape {rewards.shape}"
                )
            return self.score(rewards, **context)
        weights = jnp.ones(rewards.shape[-1]) if weights is None else jnp.asarray(weights)
        if weights.shape != rewards.shape[-1:]:
            raise ValueError(
                f"there are {rewards.shape[-1]} rewards a completion, and weights of shape "
                f"{weights.shape}: give each reward a weight"
            )
        # A completion without any reward counts as one whose single reward is NaN.
        unknown_PG = jnp.isnan(rewards).all(-1)
        total_PG = jnp.where(unknown_PG, jnp.nan, jnp.nansum(rewards * weights, axis=-1))
        if not self.decouples_rewards:
            return self.score(total_PG, **context)
        decoupled_PG = shared.decoupled_rewards(rewards, weights, self.min_reward_std)
        decoupled_PG = jnp.where(unknown_PG, jnp.nan, decoupled_PG)
        settled = {
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": "none",
            "min_reward_std": 0.0,
            "drop_all_failed_prompts": False,
        }
        own = {field.name for field in dataclasses.fields(self)}
        plain = dataclasses.replace(self, **{k: v for k, v in settled.items() if k in own})
        kept_P = shared.kept_prompts(total_PG, self.drop_all_failed_prompts)
        return plain.score(decoupled_PG, **context)._replace(kept_P=kept_P)

    def objective(
        self,
        log_ratio: jax.Array,
        tokens: Tokens,
        prepared: Prepared,
        log_probs: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, Metrics]:
        """The algorithm's own term of the loss, and `own_metrics` by their short names, as sums.

        Args:
          log_ratio: log-probs of the policy less those of the anchor, in the shape of the tokens; 0
            at tokens that are not trained on. The gradient flows through it alone.
          log_probs: as for `loss`, for an algorithm that `reads_absolute_log_probs`.
        """
        raise NotImplementedError

    def advantages(self, rewards_PG: jax.Array, scale: str, eps: float) -> shared.Advantages:
        """The result of `score` in an algorithm whose advantages are scaled rewards.

        Args:
          rewards_PG: [P, G], rewards of the whole iteration.
          scale, eps: as for `shared.scale_rewards`.
        """
        rewards_PG = shared.as_groups(rewards_PG)
        scaled_PG, spread_P = shared.scale_rewards(rewards_PG, scale, self.min_reward_std, eps)
        kept_P = shared.kept_prompts(rewards_PG, self.drop_all_failed_prompts)
        return jax.lax.stop_gradient(shared.Advantages(scaled_PG, kept_P, spread_P))

    def token_weights(self, tokens: Tokens, prepared: Prepared) -> jax.Array:
        """The weight of a token of each completion in the penalties, [P, G] or [P, 1].

        It is 1 / kept tokens, so that the penalties are means over tokens.
        """
        return prepared.weights.kept_token_P[:, None]

    def normalise(self, scores: Any, tokens: Tokens) -> Prepared:
        """Adds the normalisers of one optimizer step's batch to `scores`.

        Raises:
          TypeError: for `scores` that `score` did not make.
          ValueError: for those of other prompts than the tokens'.
        """
        if not hasattr(scores, "kept_P"):
            raise TypeError(
                f"scores is what {type(self).__name__}.score makes of rewards [P, G]; given "
                f"{type(scores).__name__}"
            )
        tokens_P = tokens.sum(tokens.trained.astype(jnp.result_type(float))).sum(-1)
        if tokens_P.shape != scores.kept_P.shape:
            raise ValueError(
                f"the tokens are of {tokens_P.shape[0]} prompts, the rewards of "
                f"{scores.kept_P.shape[0]}; pass the same groups"
            )
        return Prepared(scores, shared.batch_normalisers(scores.kept_P, tokens_P))

    def prepare(
        self,
        rewards: jax.Array,
        tokens: Tokens,
        *,
        weights: Any = None,
        entropy_P: jax.Array | None = None,
    ) -> Prepared:
        """`judge` and `normalise` at once, for an iteration of one optimizer step."""
        lengths_PG = shared.lengths(tokens, least=0)
        scores = self.judge(rewards, weights, entropy_P=entropy_P, lengths_PG=lengths_PG)
        return self.normalise(scores, tokens)

    def loss(
        self,
        log_probs: Mapping[str, jax.Array],
        tokens: Tokens,
        prepared: Prepared,
        *,
        entropy: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The loss and metrics of some whole groups, as sums that add up over the parts of a batch.

        Args:
          log_probs: those of "policy" and of the names that the algorithm `needs`, each in the
            shape of the tokens, in any float dtype. Values at tokens that are not trained on do not
            matter. The gradient flows into "policy".
          tokens: which tokens are trained on, and whose they are.
          prepared: the rows of `prepare` or `normalise` that belong to these groups.
          entropy: the policy's entropy at each token, in the shape of the tokens, where
            `entropy_bonus` is above 0. The gradient flows into it too.

        Returns:
          Scalar float32 loss (float64 under x64) and a dict of scalars, named as `metrics` says.
        """
        policy, weights = log_probs["policy"], prepared.weights
        log_ratio = shared.log_ratios(policy, log_probs["anchor"], tokens.trained)
        k3_PG = tokens.sum(shared.k3(log_ratio))
        weighted, corrections = self._correction(log_probs, tokens, prepared)
        read = dict(log_probs)
        if "divergence" in read:
            read["divergence"] = weighted(read["divergence"].astype(log_ratio.dtype))
        loss, metrics = self.objective(weighted(log_ratio), tokens, prepared, read)
        token_weight_PG = self.token_weights(tokens, prepared)

        def mean_of_kept(values_PG):
            return (weights.kept_token_P * values_PG.sum(-1)).sum()

        metrics = {
            "loss": loss,
            "anchor_kl": (weights.token_P * k3_PG.sum(-1)).sum(),
            "abs_log_ratio": (weights.group_P * jnp.abs(tokens.sum(log_ratio)).mean(-1)).sum(),
            "kl_penalty": mean_of_kept(k3_PG),
            "dropped_prompts": (~prepared.scores.kept_P).sum(dtype=k3_PG.dtype),
            "zero_std_frac": jnp.where(prepared.scores.spread_P, 0.0, weights.group_P).sum(),
            **corrections,
            **metrics,
        }
        if self.beta_anchor_kl:
            loss = loss + self.beta_anchor_kl * (token_weight_PG * k3_PG).sum()
        if self.beta_reference_kl:
            to_reference = shared.log_ratios(policy, log_probs["reference"], tokens.trained)
            kl_PG = tokens.sum(shared.KL_ESTIMATORS[self.kl_estimator](to_reference))
            metrics[REFERENCE_KL.name] = mean_of_kept(kl_PG)
            loss = loss + self.beta_reference_kl * (token_weight_PG * kl_PG).sum()
        if self.entropy_bonus:
            if entropy is None:
                raise ValueError(
                    f"entropy_bonus={self.entropy_bonus} needs the policy's entropy at each token: "
                    "pass `entropy` too"
                )
            mean = mean_of_kept(tokens.sum(entropy.astype(log_ratio.dtype)))
            metrics["entropy_bonus"] = mean
            loss = loss - self.entropy_bonus * mean
        return loss, {f"{self.name}/{name}": value for name, value in metrics.items()}

    def _correction(self, log_probs, tokens: Tokens, prepared: Prepared):
        """A function that weighs the gradient of tokens for the sampler, and what it did."""
        if not self.corrects:
            return lambda values: values, {}
        anchor = jax.lax.stop_gradient(log_probs["anchor"])
        apart = shared.log_ratios(anchor, log_probs["sampler"], tokens.trained)
        if self.correction_level == "sequence":
            apart = tokens.spread(tokens.sum(apart))
        weight = jnp.exp(jnp.minimum(apart, _LARGEST_LOG_WEIGHT))
        beyond = weight > self.correction_cap
        instead = self.correction_cap if self.sampler_correction == "truncate" else 0.0
        weight = jnp.where(beyond, instead, weight)
        token_P = prepared.weights.token_P

        def weighted(values):
            fixed = jax.lax.stop_gradient(values)
            return fixed + weight * (values - fixed)

        return weighted, {
            "sampler_weight": (token_P * tokens.sum(weight).sum(-1)).sum(),
            "sampler_clip_frac": (token_P * tokens.sum(beyond.astype(weight.dtype)).sum(-1)).sum(),
        }
