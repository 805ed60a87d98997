"""The update: a batch of scored completions -> new parameters.

A token that is there but not trained on (what a tool said, say) is seen by later tokens, and has no
part in loss, gradient or metrics. How the gradient is taken is in `gradient`.

Letters: P prompts, G completions of a prompt, T completion tokens, B streams side by side, M
micro-batches, C completion places of a stream.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adpo_jax.devices.sharding import compiler_options
from adpo_jax.losses.algorithm import LOG_PROBS, Algorithm, Metric, Prepared
from adpo_jax.losses.imitation import Imitation
from adpo_jax.losses.shared import k3
from adpo_jax.model import lora
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Batch
from adpo_jax.update.gradient import ForwardPass, Gradient, Load, Teacher, TokenValues
from adpo_jax.update.layouts import Layout, layout_of
from adpo_jax.update.packing import PackedBatch
from adpo_jax.update.state import TrainState, check_kind

SKIPPED = "update/skipped"

# The metrics that an update measures besides the algorithm's own. One over "steps" is a mean over
# optimizer steps; one over "first" is that of the first step, before the policy has moved.
METRICS = (
    Metric("rollout/mismatch_kl", "first", "k3 estimate of KL(sampler || trainer), nats a token"),
    Metric(
        "rollout/mismatch_ratio_max",
        "first",
        "the largest ratio between the sampler's and the trainer's probability of a token",
    ),
    Metric("rollout/entropy", "tokens", "the policy's mean token entropy, nats"),
    Metric("update/tokens", "sum", "completion tokens trained on, an epoch"),
    Metric("update/kept_tokens", "sum", "those of the prompts that were kept"),
    Metric("update/kept_prompts", "sum", "prompts that were kept, an epoch"),
    Metric("update/grad_norm", "steps", "global norm of the gradient before clipping"),
    Metric(SKIPPED, "steps", "share of the optimizer steps that were not sound"),
    Metric("update/padding_frac", "steps", "share of the places that hold no token"),
)
# Those of a mixture of experts; each is a mean over the layers.
MIXTURE_METRICS = (
    Metric("router/busiest", "steps", "tokens of the busiest expert over an even share"),
    Metric("router/idle_frac", "steps", "share of the experts that no token went through"),
    Metric(
        "router/balance_loss",
        "steps",
        "auxiliary loss of the router before its weight, the mean of those of the micro-batches; "
        "the number of experts of a token where they are even",
    ),
    Metric(
        "router/replay_changed_frac",
        "steps",
        "share of the experts that tokens take as the sampler took them and that the policy's "
        "own router would not have chosen",
    ),
)


def make_log_probs(policy: Policy, *, num_micro: int = 1, temperature: float = 1.0) -> Callable:
    """Makes a jitted `(params, batch) -> (log_probs, entropy)`, without gradient.

    Both results are float32 in nats and have the shape of the batch's layout: [P, G, T] for a
    padded `Batch`, [B, M, C] for a `PackedBatch`. They are meaningless where there is no token.

    Args:
      num_micro: micro-batches of a padded `Batch`, run one after the other; divides P. A
        `PackedBatch` has its own.
    """
    forward = ForwardPass(policy, temperature, with_entropy=True)

    def log_probs(params, batch: Batch | PackedBatch):
        return forward.batch(params, layout_of(batch, num_micro=num_micro))

    return jax.jit(log_probs, compiler_options=compiler_options(policy.mesh))


def make_update(
    policy: Policy,
    algorithm: Algorithm | Imitation,
    optimizer: optax.GradientTransformation,
    *,
    num_micro: int = 1,
    temperature: float = 1.0,
    max_anchor_kl: float = 0.0,
    with_entropy: bool = True,
    teacher: Policy | None = None,
    router_aux_loss_coef: float = 0.0,
) -> Callable:
    """Makes the optimizer step, a jitted `(state, batch, scores, log_probs) -> (state, metrics)`.

    Args:
      algorithm: one of `losses`, e.g. `losses.Adpo`.
      num_micro: micro-batches of a padded `Batch`, whose gradients are summed; divides the number
        of prompts. A `PackedBatch` has its own.
      temperature: the sampler's temperature; the log-probs of the loss are tempered alike.
      max_anchor_kl: KL to the anchor, in nats a token, beyond which the step is skipped; 0 for no
        limit.
      with_entropy: whether to measure the policy's entropy; False spares a pass over the logits.
      teacher: the policy of `state.fixed_params["teacher"]`, where the algorithm reads the
        divergence from it (`teacher_beta`).
      router_aux_loss_coef: weight of the auxiliary loss that spreads tokens over the experts of a
        mixture (`mixture.balance_loss`), beside the algorithm's loss; 0 for none. It is of the
        tokens of a micro-batch together, so it depends on how the batch is cut.

    The step takes

      state       donated
      batch       P prompts: a `PackedBatch` of `packing.pack`, or a padded `Batch`
      scores      the result of `algorithm.score` or `judge` for those prompts
      log_probs   a dict of log-probs in the shape of the batch: "anchor", and the others that the
                  algorithm `needs`. A `PackedBatch` may hold them itself; None is an empty dict.

    and returns the new state and a flat dict of float32 scalars, the metrics of `METRICS` and those
    of the algorithm.

    Without "anchor" the anchor is the policy of this very step: its log-probs are the policy's own,
    without gradient, and cost no forward. A loss that needs log-probs of others costs a forward
    before the gradient where micro-batches do not hold whole groups.

    A step whose loss or gradient is not finite is skipped, as one beyond `max_anchor_kl` is: the
    parameters and the optimizer stay as they were, and "update/skipped" is 1.

    Raises:
      TypeError: for a policy, an algorithm or an optimizer that is none; the step for arguments of
        other kinds.
      ValueError: the step for log-probs that the loss needs and that are not given, or of another
        shape than the batch.
    """
    check_kind("policy", policy, Policy, "the first of what Policy.from_pretrained returns")
    check_kind("algorithm", algorithm, Algorithm | Imitation, "losses.Adpo(), with its brackets")
    check_kind("optimizer", optimizer, optax.GradientTransformation, "optax.adamw(1e-5), say")
    if not (isinstance(num_micro, int) and num_micro >= 1):
        raise ValueError(f"num_micro is a whole number, 1 or more; given {num_micro!r}")
    if max_anchor_kl and algorithm.anchor_kl_metric is None:
        raise ValueError(
            f"max_anchor_kl={max_anchor_kl} limits the KL to an anchor, and {algorithm.name} has "
            "none; leave it 0"
        )
    if router_aux_loss_coef and not policy.config.mixture:
        raise ValueError(
            "router_aux_loss_coef spreads tokens over the experts of a mixture, and the model has "
            "none; leave it 0"
        )
    if (teacher is None) != (algorithm.teacher_beta is None):
        raise ValueError(
            f"{algorithm.name} reads "
            f"{'no divergence from a teacher' if teacher else 'the divergence from a teacher'}: "
            f"make the update {'without' if teacher else 'with'} one"
        )

    forward = ForwardPass(
        policy,
        temperature,
        with_entropy or bool(algorithm.entropy_bonus),
        None if teacher is None else Teacher(teacher, algorithm.teacher_beta),
        balance_weight=router_aux_loss_coef,
    )

    def update(state: TrainState, batch: Batch | PackedBatch, scores, log_probs):
        check_kind("state", state, TrainState, "the result of init_state or of the step before")
        check_kind("batch", batch, Batch | PackedBatch, "of records.make_batch or packing.pack")
        check_kind("log_probs", log_probs, dict | None, "by policy, [P, G, T] or [B, M, C]")
        layout = layout_of(batch, log_probs, num_micro)
        _check_given(algorithm, layout)
        prepared = algorithm.normalise(scores, layout.tokens)
        taught = forward
        if teacher is not None:
            taught = forward.with_teacher(state.fixed_params["teacher"])
        gradient = Gradient(taught, algorithm)
        grads, values, load = gradient(state.trained, state.frozen, layout, prepared)
        loss, metrics = gradient.loss_of(values, layout, prepared)
        metrics |= _sampling_metrics(values, layout, with_entropy)
        if isinstance(algorithm, Algorithm):
            metrics |= _kept_metrics(prepared, layout)
        if load is not None:
            metrics |= _mixture_metrics(load, batch)
        metrics["update/grad_norm"] = optax.tree.norm(grads)
        sound = jnp.isfinite(loss) & jnp.isfinite(metrics[algorithm.loss_metric])
        sound &= jnp.isfinite(metrics["update/grad_norm"])
        if max_anchor_kl:
            sound &= metrics[algorithm.anchor_kl_metric] <= max_anchor_kl
        metrics[SKIPPED] = 1.0 - sound
        return _applied(optimizer, grads, state, sound), metrics

    return jax.jit(update, donate_argnums=0, compiler_options=compiler_options(policy.mesh))


def _applied(
    optimizer: optax.GradientTransformation, grads, state: TrainState, sound: jax.Array
) -> TrainState:
    """The state after the optimizer's step; where it is not sound, the state as it was."""
    before = state.trained, state.opt_state
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        after = optax.apply_updates(state.trained, updates), opt_state
    trained, opt_state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, before)
    return state.replace(params=lora.join(trained, state.frozen), opt_state=opt_state)


def _check_given(algorithm: Algorithm | Imitation, layout: Layout) -> None:
    shape = layout.tokens.trained.shape
    for whose, values in layout.log_probs.items():
        if whose not in LOG_PROBS:
            known = ", ".join(name for name in LOG_PROBS if name != "policy")
            raise ValueError(f"log_probs of {whose!r}: known are {known}")
        if values.shape != shape:
            raise ValueError(
                f"log_probs of {whose!r} have the shape of the batch's tokens, {shape}; given "
                f"{values.shape}"
            )
    missing = sorted(algorithm.needs - {"anchor"} - layout.log_probs.keys())
    if missing:
        raise ValueError(
            f"{algorithm.name} needs the log-probs of {', '.join(missing)} beside the batch; given "
            f"those of {', '.join(sorted(layout.log_probs))}"
        )


def _sampling_metrics(
    values: TokenValues, layout: Layout, with_entropy: bool
) -> dict[str, jax.Array]:
    """Metrics that compare the policy with the sampler over the trained tokens."""
    trained = layout.tokens.trained
    tokens = jnp.sum(trained, dtype=jnp.float32)
    log_ratio = jnp.where(trained, values.log_probs - layout.log_probs["sampler"], 0.0)
    metrics = {
        "rollout/mismatch_kl": jnp.sum(k3(-log_ratio)) / jnp.maximum(tokens, 1.0),
        "rollout/mismatch_ratio_max": jnp.exp(jnp.max(jnp.abs(log_ratio))),
        "update/tokens": tokens,
    }
    if with_entropy:
        total = jnp.sum(jnp.where(trained, values.entropy, 0.0))
        metrics["rollout/entropy"] = total / jnp.maximum(tokens, 1.0)
    return metrics


def _kept_metrics(prepared: Prepared, layout: Layout) -> dict[str, jax.Array]:
    """How much of a batch has a part in the loss (`drop_all_failed_prompts`)."""
    tokens, kept_P = layout.tokens, prepared.scores.kept_P
    tokens_P = tokens.sum(tokens.trained.astype(jnp.float32)).sum(-1)
    return {
        "update/kept_tokens": jnp.sum(jnp.where(kept_P, tokens_P, 0.0)),
        "update/kept_prompts": jnp.sum(kept_P, dtype=jnp.float32),
    }


def _mixture_metrics(load: Load, batch: Batch | PackedBatch) -> dict[str, jax.Array]:
    """How the tokens of a batch spread over experts."""
    even = jnp.maximum(jnp.mean(load.tokens, axis=-1, keepdims=True), 1e-9)
    num_tokens = jnp.sum(load.probabilities[0])
    metrics = {
        "router/busiest": jnp.mean(jnp.max(load.tokens / even, axis=-1)),
        "router/idle_frac": jnp.mean(load.tokens == 0, dtype=jnp.float32),
        "router/balance_loss": load.balance_loss(num_tokens),
    }
    if load.changed is not None:
        replayed = jnp.sum(batch.experts > 0, dtype=jnp.float32)
        changed = jnp.sum(load.changed)
        metrics["router/replay_changed_frac"] = changed / jnp.maximum(replayed, 1.0)
    return metrics


# The metrics that steps are weighted by in means over tokens or over what was kept.
_COUNTS = {
    "tokens": "update/tokens",
    "kept tokens": "update/kept_tokens",
    "kept groups": "update/kept_prompts",
}


def averaged_metrics(
    declared: Sequence[Metric], history: Sequence[Mapping[str, Any]], epochs: int
) -> dict[str, float]:
    """The metrics of an iteration from those of its optimizer steps.

    Means over tokens, and over what was kept, are weighted by how many of them each step has, and
    counts are summed over an epoch, so that they do not depend on the size of a mini-batch. Steps
    that lack a metric, since no experts of their completions are known, are left out of it.

    Args:
      declared: the metrics, which say how each is averaged.
      history: the values of each optimizer step, those of `_COUNTS` among them.
    """
    over = {metric.name: metric.over for metric in declared}
    metrics = {}
    history = [{name: float(value) for name, value in step.items()} for step in history]
    for name in dict.fromkeys(name for step in history for name in step):
        steps = [step for step in history if name in step]
        values = [step[name] for step in steps]
        if over[name] == "first":
            metrics[name] = values[0]
        elif over[name] == "sum":
            metrics[name] = sum(values) / epochs
        else:
            count = _COUNTS.get(over[name])
            weights = [step[count] for step in steps] if count else []
            metrics[name] = float(np.average(values, weights=weights if any(weights) else None))
    return metrics
