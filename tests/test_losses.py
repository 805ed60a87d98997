import dataclasses
import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adpo_jax import adaptive_tau, adpo_loss, grpo_loss, losses, target_distribution
from adpo_jax.losses import (
    ALGORITHMS,
    Adpo,
    Algorithm,
    Cispo,
    Dppo,
    DrGrpo,
    Gmpo,
    Grpo,
    Gspo,
    Lpo,
    PaddedTokens,
    ReinforcePp,
    Rloo,
    rloo_loss,
)
from adpo_jax.losses.algorithm import Metric
from adpo_jax.losses.parameters import parameter, union
from adpo_jax.records import GradedGroups, Prompts
from adpo_jax.rewards import Scores

P, G, T = 4, 8, 6


def make_batch(seed=0, prompts=P, group=G, tokens=T, ratio=0.3):
    """Flat log_probs, anchor_log_probs, rewards, mask with ragged lengths, as numpy."""
    rng = np.random.default_rng(seed)
    rows = prompts * group
    anchor = -rng.exponential(1.0, (rows, tokens)).astype(np.float32)
    log_probs = anchor + ratio * rng.standard_normal((rows, tokens)).astype(np.float32)
    rewards = rng.integers(0, 2, rows).astype(np.float32) - rng.random(rows).astype(np.float32) / 9
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))
    return log_probs, anchor, rewards, mask.astype(np.float32)


def fold(array, group=G):
    return jnp.asarray(array).reshape(-1, group, *array.shape[1:])


def folded_batch(**kwargs):
    """log_probs, anchor_log_probs [P, G, T], rewards [P, G] and the tokens."""
    *arrays, mask = (fold(array, kwargs.get("group", G)) for array in make_batch(**kwargs))
    return *arrays, PaddedTokens(mask > 0)


def loss_of(algorithm, log_probs, anchor, tokens, prepared):
    return algorithm.loss({"policy": log_probs, "anchor": anchor}, tokens, prepared)


@functools.cache
def jitted(loss_fn, **options):
    """Compiled once for all tests that call it with these options and shapes."""
    return jax.jit(functools.partial(loss_fn, **options))


@functools.cache
def jitted_grad(loss_fn, **options):
    return jax.jit(jax.value_and_grad(lambda *batch: loss_fn(*batch, **options)[0]))


def loss_and_metrics(loss_fn, *batch, **options):
    return jitted(loss_fn, **options)(*batch)


def loss_and_grad(loss_fn, *batch, **options):
    return jitted_grad(loss_fn, **options)(*batch)


def targets(rewards, **options):
    return jitted(target_distribution, **options)(jnp.asarray(rewards))


# The facts of the algorithm.


@pytest.mark.parametrize("beta_reward", [0.05, 0.5, 5.0])
def test_the_loss_on_policy_is_log_g_whatever_the_rewards(beta_reward):
    log_probs, _, rewards, mask = make_batch()
    loss, _ = loss_and_metrics(
        adpo_loss, log_probs, log_probs, rewards, mask, beta_reward=beta_reward
    )
    np.testing.assert_allclose(loss, math.log(G), rtol=1e-6)


def test_the_gradient_on_policy_is_reinforce_with_an_advantage_that_sums_to_zero():
    log_probs, _, rewards, mask = make_batch()
    _, gradient = loss_and_grad(adpo_loss, log_probs, log_probs, rewards, mask)
    q_PG = targets(fold(rewards))
    advantage_PG = (q_PG - 1 / G) / jitted(adaptive_tau)(q_PG)[:, None]
    np.testing.assert_allclose(advantage_PG.sum(-1), np.zeros(P), atol=1e-5)
    np.testing.assert_allclose(
        fold(gradient), -advantage_PG[..., None] / P * fold(mask), rtol=1e-5, atol=1e-7
    )


def test_equal_rewards_give_a_uniform_target_no_gradient_at_the_anchor_and_a_pull_back_elsewhere():
    rewards = np.full(2 * 6, 0.9, np.float32)
    log_probs, anchor, _, mask = make_batch(prompts=2, group=6)
    np.testing.assert_array_equal(targets(fold(rewards, 6)), np.full((2, 6), 1 / 6, np.float32))
    _, at_anchor = loss_and_grad(adpo_loss, anchor, anchor, rewards, mask, num_generations=6)
    np.testing.assert_allclose(at_anchor, 0, atol=1e-7)

    _, elsewhere = loss_and_grad(adpo_loss, log_probs, anchor, rewards, mask, num_generations=6)
    ratio_PG = fold(((log_probs - anchor) * mask).sum(-1), 6)
    highest = jnp.argmax(ratio_PG, -1)
    gradient_PG = fold(elsewhere, 6)[..., 0]
    # Descent lowers the completion that rose most above the anchor.
    assert (jnp.take_along_axis(gradient_PG, highest[:, None], -1) > 0).all()
    assert jnp.vdot(gradient_PG, ratio_PG) > 0


def test_a_constant_added_to_a_whole_group_changes_nothing():
    log_probs, anchor, rewards, _ = make_batch()
    mask = np.ones_like(log_probs)
    shift = np.repeat(np.array([3.0, -7.0, 0.5, 20.0], np.float32), G)[:, None] / T
    loss, gradient = loss_and_grad(adpo_loss, log_probs, anchor, rewards, mask)
    shifted_loss, shifted = loss_and_grad(adpo_loss, log_probs + shift, anchor, rewards, mask)
    np.testing.assert_allclose(shifted_loss, loss, rtol=2e-6)
    np.testing.assert_allclose(shifted, gradient, atol=2e-6)


def test_permuting_the_rows_of_a_group_permutes_its_gradient():
    batch = make_batch()
    order = np.arange(P * G)
    order[G : 2 * G] = G + np.random.default_rng(1).permutation(G)
    loss, gradient = loss_and_grad(adpo_loss, *batch[:1], *batch[1:])
    permuted_loss, permuted = loss_and_grad(adpo_loss, *(array[order] for array in batch))
    np.testing.assert_allclose(permuted_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(permuted, gradient[order], atol=1e-7)


def test_rows_of_different_prompts_do_not_mix():
    log_probs, anchor, rewards, mask = make_batch()
    _, gradient = loss_and_grad(adpo_loss, log_probs, anchor, rewards, mask)
    changed = rewards.copy()
    changed[:G] = changed[:G][::-1]
    _, other = loss_and_grad(adpo_loss, log_probs, anchor, changed, mask)
    assert np.abs(other[:G] - gradient[:G]).max() > 1e-3
    np.testing.assert_array_equal(other[G:], gradient[G:])


@pytest.mark.parametrize("tau", [0.3, 0.8, 2.0])
def test_the_optimum_is_the_anchor_times_q_to_the_tau(tau):
    # Log-probabilities over all G completions, so that pi is a distribution to be optimised.
    rng = np.random.default_rng(0)
    anchor = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((1, G)), jnp.float32))
    rewards_PG = jnp.asarray(rng.random((1, G)), jnp.float32)
    algorithm = Adpo(tau=tau, use_adaptive_tau=False, beta_reward=1.0)
    tokens = PaddedTokens(jnp.ones((1, G, 1), bool))
    prepared = jax.jit(algorithm.prepare)(rewards_PG, tokens)

    def loss(logits):
        log_pi = jax.nn.log_softmax(logits)
        return loss_of(algorithm, log_pi[..., None], anchor[..., None], tokens, prepared)[0]

    def descend(_, logits):
        return logits - tau**2 * jax.grad(loss)(logits)

    logits = jax.lax.fori_loop(0, 4000, descend, anchor)
    expected = jax.nn.softmax(anchor + tau * jnp.log(prepared.scores.q_PG))
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, rtol=2e-3)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 50.0])
def test_two_completions_have_the_same_target_whatever_the_gap(gap):
    q = targets(jnp.array([[2.0 + gap, 2.0]]), beta_reward=0.5)
    np.testing.assert_allclose(q, [[0.944, 0.056]], atol=5e-4)


@pytest.mark.parametrize(("right", "entropy", "tau"), [(7, 0.94, 0.425), (1, 0.08, 0.769)])
def test_an_easy_prompt_gets_a_sharp_temperature_and_a_hard_one_a_high(right, entropy, tau):
    q = targets((jnp.arange(8) < right).astype(float)[None])
    relative = -(q * jnp.log(q)).sum() / math.log(8)
    np.testing.assert_allclose(relative, entropy, atol=5e-3)
    np.testing.assert_allclose(jitted(adaptive_tau)(q), [tau], atol=2e-3)


# Rewards.


def test_scale_rewards_divides_by_the_group_the_batch_or_nothing():
    rewards = np.array([[0.0, 1.0, 2.0], [0.0, 10.0, 20.0]], np.float32)
    centred = rewards - rewards.mean(-1, keepdims=True)
    scaled = {
        "group": centred / rewards.std(-1, ddof=1, keepdims=True),
        "batch": centred / rewards.std(ddof=1),
        "none": centred,
    }
    for scale, z in scaled.items():
        expected = jax.nn.softmax(z / 5.0)
        q = targets(rewards, beta_reward=5.0, scale_rewards=scale)
        np.testing.assert_allclose(q, expected, rtol=1e-5, err_msg=scale)
        loss, _ = loss_and_metrics(
            adpo_loss,
            *make_batch(prompts=2, group=3)[:2],
            rewards.ravel(),
            np.ones((6, T)),
            num_generations=3,
            scale_rewards=scale,
        )
        assert np.isfinite(loss)


def test_batch_scaling_uses_the_whole_iteration_while_normalisers_use_the_mini_batch():
    log_probs, anchor, rewards, tokens = folded_batch()
    algorithm = Adpo(scale_rewards="batch")
    scores = jax.jit(algorithm.score)(rewards)
    first = jax.tree.map(lambda leaf: leaf[:2], scores)
    part = PaddedTokens(tokens.trained[:2])
    prepared = algorithm.normalise(first, part)
    np.testing.assert_allclose(prepared.weights.kept_group_P, [0.5, 0.5])
    np.testing.assert_array_equal(prepared.scores.q_PG, targets(rewards, scale_rewards="batch")[:2])
    assert np.abs(algorithm.score(rewards[:2]).q_PG - prepared.scores.q_PG).max() > 1e-3
    loss, _ = loss_of(algorithm, log_probs[:2], anchor[:2], part, prepared)
    assert loss > 1.0


def test_a_group_with_less_spread_than_min_reward_std_counts_as_equal():
    rewards = jnp.array([[0.0, -0.01, -0.02, -0.05], [0.0, 1.0, 0.0, 1.0]])
    q = targets(rewards, min_reward_std=0.1)
    np.testing.assert_array_equal(q[0], np.full(4, 0.25, np.float32))
    np.testing.assert_allclose(q[1], targets(rewards)[1])
    assert targets(rewards)[0, 0] > 0.5

    log_probs, anchor, _, mask = make_batch(prompts=2, group=4)
    for loss_fn in (adpo_loss, grpo_loss):
        arguments = (log_probs, anchor, rewards.ravel(), mask)
        prefix = loss_fn.__name__.removesuffix("_loss")
        _, published = loss_and_metrics(loss_fn, *arguments, num_generations=4)
        _, floored = loss_and_metrics(loss_fn, *arguments, num_generations=4, min_reward_std=0.1)
        assert published[f"{prefix}/zero_std_frac"] == 0.0
        assert floored[f"{prefix}/zero_std_frac"] == 0.5


@pytest.mark.parametrize("reward", [0.1, 0.9, -0.05, 1 / 3])
@pytest.mark.parametrize(
    "algorithm",
    [Adpo(), Grpo(), Rloo(), ReinforcePp(baseline="group")],
    ids=["adpo", "grpo", "rloo", "reinforce_pp"],
)
def test_the_rounding_of_a_mean_is_no_spread(algorithm, reward):
    # Six times 0.9 over six is not 0.9 in float32.
    scores = jax.jit(algorithm.score)(jnp.full((1, 6), reward))
    assert not scores.spread_P.any()
    if not isinstance(algorithm, Adpo):
        np.testing.assert_array_equal(scores.advantages_PG, 0)


def test_failed_prompts_leave_the_loss_mean_and_the_kl_mean_and_are_counted():
    log_probs, anchor, rewards, mask = make_batch()
    rewards[:G] = -np.arange(G) / 100  # all <= 0: failed
    rewards[G : 2 * G] = np.abs(rewards[G : 2 * G]) + 0.1
    rewards[2 * G :: G] = 1.0
    options = {"beta_anchor_kl": 0.3, "drop_all_failed_prompts": True}
    for loss_fn in (adpo_loss, grpo_loss):
        prefix = loss_fn.__name__.removesuffix("_loss")
        loss, gradient = loss_and_grad(loss_fn, log_probs, anchor, rewards, mask, **options)
        kept, kept_gradient = loss_and_grad(
            loss_fn, log_probs[G:], anchor[G:], rewards[G:], mask[G:], **options
        )
        np.testing.assert_allclose(loss, kept, rtol=1e-6)
        np.testing.assert_array_equal(gradient[:G], 0)
        np.testing.assert_allclose(gradient[G:], kept_gradient, atol=1e-7)
        _, metrics = loss_and_metrics(loss_fn, log_probs, anchor, rewards, mask, **options)
        assert metrics[f"{prefix}/dropped_prompts"] == 1


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_a_batch_with_every_prompt_dropped_has_loss_zero_and_no_gradient(loss_fn):
    log_probs, anchor, rewards, mask = make_batch()
    options = {"drop_all_failed_prompts": True, "beta_anchor_kl": 1.0}
    failed = (log_probs, anchor, -np.abs(rewards), mask)
    loss, gradient = loss_and_grad(loss_fn, *failed, **options)
    assert loss == 0.0
    np.testing.assert_array_equal(gradient, 0)
    assert all(np.isfinite(value) for value in loss_fn(*failed, **options)[1].values())


# The policy's temperature.


def test_the_policy_entropy_mode_raises_tau_with_entropy_between_its_bounds():
    rewards, entropy = jnp.zeros((3, 2)), jnp.array([0.0, 0.5, 1.0])
    algorithm = Adpo(
        tau=1.0,
        adaptive_tau_alpha=1.0,
        adaptive_tau_min=1.2,
        adaptive_tau_max=1.7,
        adaptive_tau_mode="policy_entropy",
    )
    scores = algorithm.score(rewards, entropy_P=entropy)
    np.testing.assert_allclose(scores.tau_P, [1.2, 1.5, 1.7])
    with pytest.raises(ValueError, match="needs entropy_P"):
        jax.jit(algorithm.score)(rewards)
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        algorithm.score(rewards, entropy_P=entropy[:2])


def test_a_flat_batch_adapts_tau_to_the_entropy_of_its_prompts():
    options = {"adaptive_tau_mode": "policy_entropy", "num_generations": G}
    _, metrics = adpo_loss(*make_batch(), entropy_P=np.full(P, 0.5), **options)
    np.testing.assert_allclose(metrics["adpo/mean_tau"], 0.8 * 1.25, rtol=1e-6)
    with pytest.raises(ValueError, match="needs entropy_P"):
        adpo_loss(*make_batch(), **options)


def test_tau_is_constant_without_adaptation_and_floored_with_it():
    log_probs, anchor, rewards, mask = make_batch()
    _, metrics = loss_and_metrics(
        adpo_loss, log_probs, anchor, rewards, mask, tau=1.3, use_adaptive_tau=False
    )
    np.testing.assert_allclose(metrics["adpo/mean_tau"], 1.3, rtol=1e-6)
    _, metrics = loss_and_metrics(
        adpo_loss, log_probs, anchor, rewards, mask, tau=0.1, adaptive_tau_min=0.3
    )
    np.testing.assert_allclose(metrics["adpo/mean_tau"], 0.3, rtol=1e-6)


def test_length_normalize_divides_each_log_ratio_by_its_tokens():
    log_probs, anchor, rewards, mask = make_batch()
    lengths = mask.sum(-1, keepdims=True)
    loss, gradient = loss_and_grad(
        adpo_loss, log_probs, anchor, rewards, mask, length_normalize=True
    )
    by_hand, by_hand_gradient = loss_and_grad(
        adpo_loss, log_probs / lengths, anchor / lengths, rewards, mask
    )
    np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
    np.testing.assert_allclose(gradient, by_hand_gradient / lengths, atol=1e-7)


# Splits: micro-batches of whole groups, and of any rows.


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
@pytest.mark.parametrize(
    "algorithm",
    [
        Adpo(beta_anchor_kl=0.2, drop_all_failed_prompts=True),
        Adpo(length_normalize=True, scale_rewards="batch"),
        Grpo(beta_anchor_kl=0.2, drop_all_failed_prompts=True, scale_rewards="batch"),
        Grpo(loss_aggregation="sequence-mean"),
        Rloo(beta_anchor_kl=0.2, drop_all_failed_prompts=True),
        *(kind(drop_all_failed_prompts=True) for kind in (Lpo, DrGrpo, Gspo, Gmpo, Cispo, Dppo)),
        ReinforcePp(beta_anchor_kl=0.1),
    ],
    ids=["adpo", "adpo_lengths", "grpo", "grpo_sequence", "rloo", "lpo", "dr_grpo", "gspo", "gmpo",
         "cispo", "dppo", "reinforce_pp"],
)  # fmt: skip
def test_sums_over_micro_batches_are_the_batch(algorithm, sizes):
    log_probs, anchor, rewards, tokens = folded_batch()
    rewards = rewards.at[1].set(-jnp.arange(G) / 50)  # one failed prompt
    prepared = jax.jit(algorithm.prepare)(rewards, tokens)
    whole_fn = jax.jit(jax.value_and_grad(functools.partial(loss_of, algorithm), has_aux=True))
    (loss, metrics), gradient = whole_fn(log_probs, anchor, tokens, prepared)
    assert set(metrics) == {metric.name for metric in algorithm.metrics}

    ends = list(itertools.accumulate(sizes, initial=0))
    parts = []
    for start, end in itertools.pairwise(ends):
        part = jax.tree.map(lambda leaf: leaf[start:end], (log_probs, anchor, tokens, prepared))  # noqa: B023
        parts.append(whole_fn(*part))
    summed = jax.tree.map(lambda *values: sum(values), *[part[0] for part in parts])
    # The terms are of order 1, and what is left of them may be small.
    np.testing.assert_allclose(summed[0], loss, rtol=1e-6, atol=1e-7)
    assert metrics.keys() == summed[1].keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(summed[1][name], value, rtol=2e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(
        np.concatenate([part[1] for part in parts]), gradient, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("length_normalize", [False, True])
def test_the_closed_form_weights_are_the_gradient_however_the_rows_are_split(length_normalize):
    log_probs, anchor, rewards, tokens = folded_batch()
    algorithm = Adpo(length_normalize=length_normalize)
    prepared = jax.jit(algorithm.prepare)(rewards, tokens)
    gradient_fn = jax.jit(jax.grad(lambda x: loss_of(algorithm, x, anchor, tokens, prepared)[0]))
    expected = gradient_fn(log_probs)

    mask = tokens.trained
    log_ratio_PG = ((log_probs - anchor) * mask).sum(-1)
    weights_PG = algorithm.sequence_weights(log_ratio_PG, tokens, prepared)
    rows = np.random.default_rng(0).permutation(P * G)
    gradient = np.zeros((P * G, T), np.float32)
    for chunk in np.split(rows, [5, 6, 20]):  # pieces that cut through groups
        weights, row_mask = weights_PG.reshape(-1)[chunk], mask.reshape(-1, T)[chunk]
        surrogate = jax.grad(lambda x, w, m: (w * (x * m).sum(-1)).sum())
        gradient[chunk] = surrogate(log_probs.reshape(-1, T)[chunk], weights, row_mask)
    np.testing.assert_allclose(fold(gradient), expected, rtol=1e-5, atol=1e-8)


# Numbers that break careless code.


@pytest.mark.parametrize("poison", [-np.inf, np.inf, np.nan])
@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_what_lies_under_the_mask_changes_nothing(loss_fn, poison):
    log_probs, anchor, rewards, mask = make_batch()
    poisoned = [np.where(mask > 0, array, poison) for array in (log_probs, anchor)]
    clean = loss_and_grad(loss_fn, log_probs, anchor, rewards, mask, beta_anchor_kl=0.5)
    other = loss_and_grad(loss_fn, *poisoned, rewards, mask, beta_anchor_kl=0.5)
    jax.tree.map(np.testing.assert_array_equal, other, clean)
    np.testing.assert_array_equal(clean[1][mask == 0], 0)


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_masked_columns_equal_sliced_columns(loss_fn):
    log_probs, anchor, rewards, _ = make_batch()
    mask = np.ones((P * G, T)) * (np.arange(T) < 4)
    options = {"beta_anchor_kl": 0.5}
    loss, gradient = loss_and_grad(loss_fn, log_probs, anchor, rewards, mask, **options)
    sliced, sliced_gradient = loss_and_grad(
        loss_fn, log_probs[:, :4], anchor[:, :4], rewards, mask[:, :4], **options
    )
    np.testing.assert_allclose(loss, sliced, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :4], sliced_gradient, atol=1e-7)


@pytest.mark.parametrize("nats", [30.0, 300.0, 3000.0])
@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_huge_log_ratios_stay_finite_and_push_back_to_the_anchor(loss_fn, nats):
    _, anchor, _, mask = make_batch()
    rewards = np.zeros(P * G)
    mask[:] = 1
    sign = np.where(np.arange(P * G) % 2, 1.0, -1.0)[:, None].astype(np.float32)
    loss, gradient = loss_and_grad(
        loss_fn, anchor + sign * nats, anchor, rewards, mask, beta_anchor_kl=0.1
    )
    assert np.isfinite(loss)
    assert np.isfinite((gradient**2).sum())
    assert ((gradient * sign) > 0).all()


def test_a_fully_masked_batch_is_finite():
    log_probs, anchor, rewards, _ = make_batch()
    nothing = np.zeros_like(log_probs)
    for loss_fn in (adpo_loss, grpo_loss):
        for options in ({}, {"beta_anchor_kl": 1.0}):
            loss, gradient = loss_and_grad(loss_fn, log_probs, anchor, rewards, nothing, **options)
            assert np.isfinite(loss)
            np.testing.assert_array_equal(gradient, 0)


def test_bf16_log_probs_are_subtracted_per_token_and_summed_in_float32():
    tokens = 1024
    _, anchor, rewards, mask = make_batch(tokens=tokens)
    anchor = jnp.asarray(anchor, jnp.bfloat16)
    log_probs = anchor * jnp.bfloat16(1.0078125)
    mask = np.ones_like(mask)
    loss, metrics = loss_and_metrics(adpo_loss, log_probs, anchor, rewards, mask)
    exact, _ = loss_and_metrics(
        adpo_loss, log_probs.astype(jnp.float32), anchor.astype(jnp.float32), rewards, mask
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact, rtol=1e-6)
    summed_first = np.abs(log_probs.sum(-1) - anchor.sum(-1)).astype(np.float32).mean()
    assert np.abs(summed_first - metrics["adpo/abs_log_ratio"]) > 0.1
    gradient = jax.grad(lambda x: adpo_loss(x, anchor, rewards, mask)[0])(log_probs)
    assert gradient.dtype == jnp.bfloat16


def test_anchor_kl_is_an_estimate_of_the_kl_and_not_the_absolute_log_ratio():
    # Exact: sum over the vocabulary of pi * k3 is KL(pi, anchor).
    rng = np.random.default_rng(0)
    log_pi, log_anchor = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((2, 6)), jnp.float32))
    pi = np.exp(np.asarray(log_pi, np.float64))
    draws = rng.choice(6, size=(8, 20_000), p=pi / pi.sum())
    _, metrics = loss_and_metrics(
        adpo_loss, log_pi[draws], log_anchor[draws], np.zeros(8), np.ones(draws.shape)
    )
    expected = (pi * (log_pi - log_anchor)).sum()
    np.testing.assert_allclose(metrics["adpo/anchor_kl"], expected, rtol=0.02)
    assert metrics["adpo/abs_log_ratio"] > 100 * expected


# GRPO.


def test_grpo_equals_a_plain_loop_over_tokens():
    log_probs, anchor, rewards, mask = make_batch()
    low, high, beta = 0.1, 0.3, 0.05
    totals, kl_totals, clipped = np.zeros(P * G), np.zeros(P * G), 0
    for row, (group, _) in enumerate(np.ndindex(P, G)):
        members = rewards[group * G : group * G + G].astype(np.float64)
        advantage = (rewards[row] - members.mean()) / (members.std(ddof=1) + 1e-6)
        for token in range(int(mask[row].sum())):
            ratio = math.exp(float(log_probs[row, token]) - float(anchor[row, token]))
            clip = min(max(ratio, 1 - low), 1 + high)
            totals[row] -= min(ratio * advantage, clip * advantage)
            clipped += clip * advantage < ratio * advantage
            kl_totals[row] += 1 / ratio - 1 - math.log(1 / ratio)
    lengths = mask.sum(-1)
    expected = {
        "token-mean": (totals + beta * kl_totals).sum() / lengths.sum(),
        "sequence-mean": ((totals + beta * kl_totals) / lengths).mean(),
    }
    options = {"clip_low": low, "clip_high": high, "beta_anchor_kl": beta}
    for aggregation, value in expected.items():
        loss, metrics = loss_and_metrics(
            grpo_loss, log_probs, anchor, rewards, mask, loss_aggregation=aggregation, **options
        )
        np.testing.assert_allclose(loss, value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["grpo/clip_frac"], clipped / lengths.sum(), rtol=1e-5)


def test_the_grpo_gradient_on_policy_is_the_advantage_and_stops_where_clipped():
    log_probs, _, rewards, mask = make_batch()
    advantages = np.asarray(Grpo().score(fold(rewards)).advantages_PG).reshape(-1, 1)
    _, gradient = loss_and_grad(grpo_loss, log_probs, log_probs, rewards, mask)
    np.testing.assert_allclose(gradient, -advantages * mask / mask.sum(), rtol=1e-5, atol=1e-8)

    far = log_probs + 0.5 * np.sign(advantages)  # already past the clip in the wanted direction
    _, gradient = loss_and_grad(grpo_loss, far, log_probs, rewards, mask)
    np.testing.assert_array_equal(gradient, 0)


# RLOO.


def test_the_rloo_advantage_is_the_reward_less_the_mean_of_the_others():
    rewards = np.array([[1.0, 0.0, 0.0, 0.5], [2.0, 2.0, 2.0, 2.0]], np.float32)
    scores = Rloo().score(jnp.asarray(rewards))
    # By hand: 1 - 0.5/3, 0 - 1.5/3, 0 - 1.5/3, 0.5 - 1/3.
    np.testing.assert_allclose(
        scores.advantages_PG, [[5 / 6, -0.5, -0.5, 1 / 6], [0, 0, 0, 0]], atol=1e-6
    )
    np.testing.assert_array_equal(scores.spread_P, [True, False])


def test_rloo_equals_a_plain_loop_over_completions():
    log_probs, anchor, rewards, tokens = folded_batch()
    algorithm = Rloo(beta_anchor_kl=0.05)
    total, kl, mask = 0.0, 0.0, tokens.trained
    for p, g in np.ndindex(P, G):
        others = [float(rewards[p, j]) for j in range(G) if j != g]
        advantage = float(rewards[p, g]) - sum(others) / len(others)
        ratios = np.asarray((log_probs - anchor)[p, g])[: int(mask[p, g].sum())].astype(np.float64)
        total -= advantage * ratios.sum()
        kl += (np.exp(-ratios) + ratios - 1).sum()
    expected = total / (P * G) + 0.05 * kl / mask.sum()
    prepared = algorithm.prepare(rewards, tokens)
    loss, metrics = loss_of(algorithm, log_probs, anchor, tokens, prepared)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["rloo/loss"], total / (P * G), rtol=1e-5)


def test_the_rloo_gradient_is_the_advantage_on_every_token_wherever_the_anchor_is():
    log_probs, anchor, rewards, tokens = folded_batch()
    prepared = Rloo().prepare(rewards, tokens)
    gradient_fn = jax.jit(jax.grad(lambda *batch: loss_of(Rloo(), *batch)[0]))
    expected = -prepared.scores.advantages_PG[..., None] * tokens.trained / (P * G)
    for base in (log_probs, anchor):
        gradient = gradient_fn(log_probs, base, tokens, prepared)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


# The reference.


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss, rloo_loss])
def test_the_pull_to_the_reference_is_k3_over_the_tokens_of_kept_prompts(loss_fn):
    log_probs, anchor, rewards, mask = make_batch(prompts=2, group=3)
    rewards[:3] = [-1.0, 0.0, -0.5]  # failed: this prompt leaves the loss
    rewards[3:] = [1.0, 0.0, 0.5]
    options = {"num_generations": 3, "drop_all_failed_prompts": True}
    reference = log_probs + np.float32(0.4)
    beta, name = 0.3, loss_fn.__name__.removesuffix("_loss")

    def loss(log_probs, **more):
        return loss_fn(log_probs, anchor, rewards, mask, **options, **more)

    plain_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    pulled = functools.partial(loss, reference_log_probs=reference, beta_reference_kl=beta)
    pulled_and_gradient = jax.jit(jax.value_and_grad(pulled, has_aux=True))
    (without, _), plain = plain_and_gradient(log_probs)
    (value, metrics), gradient = pulled_and_gradient(log_probs)
    # By hand: d = 0.4 at every token, k3 = exp(d) - d - 1 and its slope by the log-prob 1 - exp(d).
    np.testing.assert_allclose(metrics[f"{name}/reference_kl"], math.exp(0.4) - 1.4, rtol=1e-4)
    np.testing.assert_allclose(value, without + beta * (math.exp(0.4) - 1.4), rtol=1e-4)
    slope = np.zeros_like(mask)
    slope[3:] = mask[3:] * beta * (1 - math.exp(0.4)) / mask[3:].sum()
    np.testing.assert_allclose(gradient - plain, slope, atol=1e-6)


def test_the_pull_to_the_reference_of_a_mean_over_sequences_is_one_too():
    log_probs, anchor, rewards, mask = make_batch()
    reference = log_probs + np.random.default_rng(2).normal(0, 0.3, log_probs.shape)
    loss, metrics = loss_and_metrics(
        functools.partial(grpo_loss, reference_log_probs=reference.astype(np.float32)),
        *(log_probs, anchor, rewards, mask),
        beta_reference_kl=1.0,
        loss_aggregation="sequence-mean",
    )
    d = reference - log_probs
    k3 = (np.exp(d) - d - 1) * mask
    pull = (k3.sum(-1) / mask.sum(-1)).mean()
    np.testing.assert_allclose(loss, metrics["grpo/loss"] + pull, rtol=1e-4)
    # The metric is a mean over tokens under every aggregation, so that losses can be compared.
    np.testing.assert_allclose(metrics["grpo/reference_kl"], k3.sum() / mask.sum(), rtol=1e-4)
    d = anchor - log_probs
    of_anchor = ((np.exp(d) - d - 1) * mask).sum() / mask.sum()
    np.testing.assert_allclose(metrics["grpo/kl_penalty"], of_anchor, rtol=1e-4)


def test_a_pull_to_a_reference_that_is_not_given_or_does_not_fit_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"beta_reference_kl=0.1 needs reference_log_probs"):
        grpo_loss(*batch, beta_reference_kl=0.1)
    with pytest.raises(ValueError, match=r"reference_log_probs must have shape \(32, 6\)"):
        grpo_loss(*batch, beta_reference_kl=0.1, reference_log_probs=batch[0][:, 1:])
    with pytest.raises(ValueError, match="beta_reference_kl must be at least 0"):
        grpo_loss(*batch, beta_reference_kl=-0.1, reference_log_probs=batch[0])


# The listwise relatives.


def test_tpo_is_cross_entropy_to_the_samplers_distribution_tilted_by_rewards():
    """By hand, as in the paper: q ~ p_old exp(u / eta), and the slope of the loss is p - q."""
    log_probs, old, rewards, mask = make_batch(prompts=3, group=4)
    rewards[:4] = 1.0
    s, s_old = ((x * mask).sum(-1).reshape(3, 4) for x in (log_probs, old))
    R = rewards.reshape(3, 4)
    std = R.std(1, keepdims=True)
    u = np.where(std > 0, (R - R.mean(1, keepdims=True)) / np.maximum(std, 1e-8), 0.0)
    q = np.exp(s_old + u / 0.7) / np.exp(s_old + u / 0.7).sum(1, keepdims=True)
    p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    loss, gradient = loss_and_grad(
        losses.tpo_loss, log_probs, old, rewards, mask, num_generations=4, beta_reward=0.7
    )
    np.testing.assert_allclose(loss, -(q * np.log(p)).sum(1).mean(), rtol=1e-5)
    expected = ((p - q) / 3).reshape(-1, 1) * mask
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_lpo_is_the_reverse_divergence_to_the_same_kind_of_target():
    log_probs, old, rewards, mask = make_batch(prompts=2, group=4)
    s, s_old = ((x * mask).sum(-1).reshape(2, 4) for x in (log_probs, old))
    R = rewards.reshape(2, 4)
    z = (R - R.mean(1, keepdims=True)) / R.std(1, ddof=1, keepdims=True)
    log_q = s_old + z - np.log(np.exp(s_old + z).sum(1, keepdims=True))
    log_p = s - np.log(np.exp(s).sum(1, keepdims=True))
    loss, _ = loss_and_grad(losses.lpo_loss, log_probs, old, rewards, mask, num_generations=4)
    np.testing.assert_allclose(loss, (np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rtol=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_all_anchor_weights_have_the_optimum_of_the_anchor_tilted_by_the_target(weight, divergence):
    """Where s = s_anchor + tau z / beta + a constant of the group, the gradient is 0."""
    _, anchor, rewards, mask = make_batch(prompts=2)
    mask[:] = 1
    R = rewards.reshape(2, G)
    z = (R - R.mean(1, keepdims=True)) / R.std(1, ddof=1, keepdims=True)
    tau, beta = 0.6, 1.3
    optimum = anchor + (tau * z / beta + np.array([[2.0], [-1.0]])).reshape(-1, 1) / T
    options = {"tau": tau, "beta_reward": beta, "use_adaptive_tau": False}
    options |= {"anchor_weight": weight, "divergence": divergence}
    _, there = loss_and_grad(adpo_loss, optimum, anchor, rewards, mask, **options)
    _, elsewhere = loss_and_grad(adpo_loss, anchor, anchor, rewards, mask, **options)
    assert np.abs(there).max() < 1e-6 < 1e-3 < np.abs(elsewhere).max()


# Several rewards.

DECOUPLED = {"multi_objective_aggregation": "normalize_then_sum"}


def several_rewards():
    rng = np.random.default_rng(3)
    rewards = rng.normal(size=(3, 7, 3)) * [1.0, 50.0, 0.1]
    rewards[0, :, 1] = 0.9  # all equal, though their mean in float32 is not 0.9
    rewards[1, 2, 2] = np.nan  # that function gave none
    return rewards, np.array([1.0, 0.5, -2.0])


def decoupled_by_hand(rewards, weights):
    centred = rewards - np.nanmean(rewards, 1, keepdims=True)
    std = np.nanstd(rewards, 1, keepdims=True, ddof=1)
    z = np.where(std > 1e-9, centred / (std + 1e-6), 0.0)
    total = np.nansum(z * weights, -1)
    return (total - total.mean()) / (total.std(ddof=1) + 1e-6)


def test_decoupled_rewards_are_standardised_one_by_one_whatever_their_scale():
    rewards, weights = several_rewards()
    expected = decoupled_by_hand(rewards, weights)
    found = Grpo(**DECOUPLED).judge(rewards, weights)
    np.testing.assert_allclose(found.advantages_PG, expected, rtol=2e-4, atol=1e-5)
    # Here nothing takes the mean of a group off again.
    uncentred = ReinforcePp(**DECOUPLED).judge(rewards, weights)
    np.testing.assert_allclose(uncentred.advantages_PG, expected, rtol=2e-4, atol=1e-5)
    larger = Grpo(**DECOUPLED).judge(rewards * [1.0, 1.0, 1000.0], weights)
    np.testing.assert_allclose(larger.advantages_PG, expected, rtol=2e-4, atol=1e-4)
    summed = Grpo().judge(rewards, weights)
    np.testing.assert_array_equal(
        summed.advantages_PG,
        Grpo().score(jnp.nansum(jnp.asarray(rewards) * weights, -1)).advantages_PG,
    )
    assert np.abs(summed.advantages_PG - expected).max() > 0.3
    q = Adpo(**DECOUPLED).judge(rewards, weights).q_PG
    np.testing.assert_allclose(q, jax.nn.softmax(expected / 0.5, -1), rtol=1e-3)

    alone = Rloo(**DECOUPLED, min_reward_std=10.0).judge(rewards, weights).advantages_PG
    only = decoupled_by_hand(rewards[..., 1:2], weights[1:2])  # the one with such a spread
    np.testing.assert_allclose(alone, only * 7 / 6, rtol=2e-4, atol=1e-5)


def test_decoupled_rewards_keep_what_a_group_is_dropped_for_and_refuse_other_shapes():
    rewards, weights = several_rewards()
    rewards[2] = -np.abs(rewards[2]) * weights  # the weighted sums are below 0, the spread stays
    scores = Grpo(**DECOUPLED, drop_all_failed_prompts=True).judge(rewards, weights)
    np.testing.assert_array_equal(scores.kept_P, [True, True, False])
    rewards[1, 2] = np.nan
    found = np.asarray(Grpo(**DECOUPLED).judge(rewards, weights).advantages_PG)
    assert np.isnan(found[1]).all()  # as a group with a single reward that is NaN
    assert np.abs(found[[0, 2]]).min() > 0
    rewards[0, 1, 0] = np.inf  # no number that could be compared, and not one that was not given
    found = np.asarray(Grpo(**DECOUPLED).judge(rewards, weights).advantages_PG)
    assert not np.isfinite(found[0]).any()
    with pytest.raises(ValueError, match=r"needs the rewards of each function, \[P, G, K\]"):
        Grpo(**DECOUPLED).judge(rewards[..., 0])
    with pytest.raises(ValueError, match="give each reward a weight"):
        Grpo(**DECOUPLED).judge(rewards, weights[:2])


def test_a_run_hands_over_each_functions_rewards_where_they_are_decoupled():
    components = {"a": np.arange(4.0), "b": np.array([1.0, np.nan, 0.0, 0.0])}
    scores = Scores(np.zeros(4, np.float32), components, {})
    groups = GradedGroups(Prompts([[1], [2]], {}), None, [], scores)
    np.testing.assert_array_equal(groups.rewards_of(["b", "a"])[0], [[1.0, 0.0], [np.nan, 1.0]])
    with pytest.raises(ValueError, match="no rewards of c; they have those of a, b"):
        groups.rewards_of(["a", "c"])


@pytest.mark.parametrize(
    "loss_fn",
    [
        losses.tpo_loss,
        losses.grpo_loss,
        losses.rloo_loss,
        losses.dr_grpo_loss,
        losses.reinforce_pp_loss,
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_no_number_makes_the_loss_none(loss_fn, bad):
    """So that the step is skipped and counted, whatever the loss."""
    log_probs, anchor, rewards, mask = make_batch(prompts=2, group=3)
    rewards[1] = bad
    value, _ = loss_fn(log_probs, anchor, rewards, mask, num_generations=3)
    assert not np.isfinite(value)


@pytest.mark.parametrize("loss_fn", [losses.tpo_loss, losses.lpo_loss])
def test_a_completion_without_trained_tokens_leaves_the_others_of_its_group_to_learn(loss_fn):
    log_probs, anchor, rewards, mask = make_batch(prompts=2, group=4)
    # Sums far below 0, as those of real completions are: that of no token is none of them.
    log_probs[:], anchor[:], mask[:] = -8.0, -8.0, 1.0
    mask[1] = 0
    gradient = jax.grad(lambda x: loss_fn(x, anchor, rewards, mask, num_generations=4)[0])(
        log_probs
    )
    moved = np.abs(np.asarray(gradient)).sum(-1)
    assert moved[1] == 0
    others = np.delete(moved, 1)
    assert others.min() > 1e-4
    mask[:4] = 0
    value, _ = loss_fn(log_probs, anchor, rewards, mask, num_generations=4)
    assert np.isfinite(value)


def test_groups_that_count_as_equal_have_one_reward_in_reinforce_pp():
    rewards = jnp.array([[0.0, -0.01, -0.02, 0.0], [0.0, 1.0, 0.0, 1.0]])
    found = np.asarray(ReinforcePp(min_reward_std=0.05).score(rewards).advantages_PG)
    assert np.ptp(found[0]) == 0
    assert np.ptp(found[1]) > 1
    same = ReinforcePp().score(jnp.full((3, 4), 0.9), lengths_PG=jnp.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(same.advantages_PG, 0)


def test_opd_refuses_an_aggregation_of_rewards_that_have_no_part_in_it():
    with pytest.raises(ValueError, match="no effect under opd"):
        losses.Opd(multi_objective_aggregation="normalize_then_sum")


def test_weights_for_the_sampler_scale_the_gradient_of_divergences_too():
    log_probs, anchor, rewards, mask = make_batch(prompts=2, group=3)
    options = {"num_generations": 3, "distillation_loss": "jsd"}

    def gradient(**more):
        def loss(divergence):
            return losses.opd_loss(
                log_probs, anchor, rewards, mask, divergence=divergence, **options, **more
            )

        return jax.grad(lambda x: loss(x)[0])(np.ones_like(log_probs))

    sampler = anchor + np.float32(math.log(2.0))
    weighted = gradient(sampler_log_probs=sampler, sampler_correction="truncate")
    np.testing.assert_allclose(weighted, 0.5 * gradient(), rtol=1e-5)


# What every loss owes.


@pytest.mark.parametrize("name", [n for n, kind in ALGORITHMS.items() if not kind.needs_teacher])
def test_every_loss_sees_trained_tokens_alone_in_any_dtype_and_on_any_mesh(name):
    loss_fn = getattr(losses, f"{name}_loss")
    *batch, mask = make_batch(prompts=8, ratio=0.4)
    mask[:, 2] = 0  # a hole
    mask[:, 0] = 1
    options = {"constant_length": T} if name == "dr_grpo" else {}
    run = jitted_grad(loss_fn, **options)
    loss, gradient = run(*batch, mask)
    np.testing.assert_array_equal(gradient[mask == 0], 0)
    assert np.abs(gradient).max() > 1e-5

    poisoned = [np.where(mask > 0, array, np.nan) for array in batch[:2]]
    jax.tree.map(np.testing.assert_array_equal, run(*poisoned, batch[2], mask), (loss, gradient))
    columns = [0, 1, 3, 4, 5]
    sliced = (*(array[:, columns] for array in batch[:2]), batch[2], mask[:, columns])
    short_loss, short = run(*sliced)
    np.testing.assert_allclose(short_loss, loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(short, gradient[:, columns], atol=1e-7)

    rounded = [jnp.asarray(array, jnp.bfloat16) for array in batch[:2]]
    half_loss, half = run(*rounded, batch[2], mask)
    exact_loss, exact = run(*(array.astype(jnp.float32) for array in rounded), batch[2], mask)
    np.testing.assert_allclose(half_loss, exact_loss, rtol=1e-6)
    np.testing.assert_allclose(half.astype(np.float32), exact, rtol=1e-2, atol=1e-5)

    mesh = jax.make_mesh((8,), ("data",))
    layout = NamedSharding(mesh, PartitionSpec("data"))
    spread = run(*(jax.device_put(array, layout) for array in (*batch, mask)))
    np.testing.assert_allclose(spread[0], loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(spread[1], gradient, atol=1e-7)


def test_the_share_of_clipped_tokens_is_of_those_whose_gradient_the_clip_changes():
    log_probs, anchor, rewards, mask = make_batch(ratio=0.6)
    A = np.asarray(Grpo().score(fold(rewards)).advantages_PG).reshape(-1, 1)
    d = np.where(mask > 0, log_probs - anchor, 0.0)
    r, mean = np.exp(d), d.sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
    risen = np.exp(anchor) * (r - 1)
    gate = 1 / (1 + np.exp(-np.where(A > 0, 4.0, 6.0) * (r - 1)))
    clipped = {
        "gspo": np.where(A > 0, mean > math.log(1.0004), mean < math.log(0.9997)) & (mask > 0),
        "gmpo": np.where(A > 0, d > 0.4, d < -0.4),
        "cispo": (r > 1.3) | (r < 0.8),
        "sapo": 4 * gate * (1 - gate) < 0.5,
        "dppo": np.where(A > 0, risen > 0.1, risen < -0.1),
    }
    options = {
        "cispo": {"clip_low": 0.2, "clip_high": 0.3},
        "sapo": {"tau_pos": 4.0, "tau_neg": 6.0},
        "dppo": {"clip_low": 0.1, "clip_high": 0.1},
    }
    for name, expected in clipped.items():
        _, metrics = loss_and_metrics(
            getattr(losses, f"{name}_loss"),
            *(log_probs, anchor, rewards, mask),
            **options.get(name, {}),
        )
        share = (expected & (mask > 0)).sum() / mask.sum()
        assert 0.05 < share < 0.95
        np.testing.assert_allclose(metrics[f"{name}/clip_frac"], share, rtol=1e-5, err_msg=name)


def test_the_signature_of_a_loss_tells_its_parameters_and_a_misspelt_one_is_refused():
    signature = inspect.signature(losses.gspo_loss)
    assert list(signature.parameters)[:4] == [
        "log_probs", "anchor_log_probs", "rewards", "completion_mask",
    ]  # fmt: skip
    assert signature.parameters["clip_low"].default == 3e-4
    assert losses.gspo_loss.__name__ == "gspo_loss"
    assert "gspo/clip_frac" in losses.gspo_loss.__doc__
    with pytest.raises(TypeError, match=r"gspo_loss has no parameter clip; it has .*clip_low"):
        losses.gspo_loss(*make_batch(), clip=0.1)


# The sampler and the entropy.


def test_weights_for_the_sampler_scale_the_gradient_of_the_objective_alone():
    log_probs, anchor, rewards, mask = make_batch(prompts=1)
    mask[:] = 1
    sampler = anchor.copy()
    sampler[0] -= np.log(1.5)  # the trainer finds these tokens 1.5 times as likely
    sampler[1] -= np.log(4.0)
    sampler[2] += np.log(2.0)
    plain_loss, plain = loss_and_grad(adpo_loss, log_probs, anchor, rewards, mask)
    for correction, beyond in (("truncate", 2.0), ("mask", 0.0)):
        given = functools.partial(adpo_loss, sampler_log_probs=sampler)
        loss, gradient = loss_and_grad(
            given, log_probs, anchor, rewards, mask, sampler_correction=correction
        )
        assert loss == plain_loss
        weights = np.ones((G, 1))
        weights[:3, 0] = 1.5, beyond, 0.5
        np.testing.assert_allclose(gradient, weights * plain, rtol=1e-5)
        _, metrics = loss_and_metrics(
            given, log_probs, anchor, rewards, mask, sampler_correction=correction
        )
        np.testing.assert_allclose(metrics["adpo/sampler_weight"], weights.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["adpo/sampler_clip_frac"], 1 / G)
    with pytest.raises(ValueError, match="sampler_correction=mask needs sampler_log_probs"):
        adpo_loss(log_probs, anchor, rewards, mask, sampler_correction="mask")


def test_the_entropy_bonus_is_the_mean_over_tokens_of_kept_prompts():
    log_probs, anchor, rewards, mask = make_batch(prompts=2, group=4)
    rewards[:4] = [-1, -2, 0, -1]
    rewards[4:] = [1, 0, 0, 1]
    entropy = np.abs(log_probs)
    options = {"num_generations": 4, "drop_all_failed_prompts": True}
    given = functools.partial(grpo_loss, entropy=entropy, entropy_bonus=0.3)
    (plain, _), (loss, metrics) = (
        loss_and_metrics(f, log_probs, anchor, rewards, mask, **options) for f in (grpo_loss, given)
    )
    mean = (entropy * mask)[4:].sum() / mask[4:].sum()
    np.testing.assert_allclose(metrics["grpo/entropy_bonus"], mean, rtol=1e-6)
    np.testing.assert_allclose(loss, plain - 0.3 * mean, rtol=1e-5)

    def of_entropy(entropy):
        given = {"entropy": entropy, "entropy_bonus": 0.3, **options}
        return grpo_loss(log_probs, anchor, rewards, mask, **given)[0]

    slope = np.zeros_like(mask)
    slope[4:] = -0.3 * mask[4:] / mask[4:].sum()
    np.testing.assert_allclose(jax.grad(of_entropy)(entropy), slope, rtol=1e-5)
    with pytest.raises(ValueError, match="entropy_bonus=0.3 needs the policy's entropy"):
        grpo_loss(log_probs, anchor, rewards, mask, entropy_bonus=0.3)
    # Summed in float32, whatever the model computes in: a sum of 301 is none of bfloat16's.
    batch = make_batch(prompts=1, group=2, tokens=301)[:3]
    ones = jnp.ones(batch[0].shape, jnp.bfloat16)
    _, metrics = grpo_loss(
        *batch, np.ones(ones.shape), entropy=ones, entropy_bonus=0.3, num_generations=2
    )
    np.testing.assert_allclose(metrics["grpo/entropy_bonus"], 1.0, rtol=1e-6)


def test_nothing_is_clipped_where_there_is_no_advantage():
    _, anchor, rewards, mask = make_batch(prompts=2, group=4)
    rewards[:4], rewards[4:] = 1.0, [1.0, 0.0, 0.0, 1.0]
    batch = (anchor + np.float32(4.0), anchor, rewards, mask)
    _, metrics = loss_and_metrics(losses.cispo_loss, *batch, num_generations=4)
    expected = mask[4:].sum() / mask.sum()
    np.testing.assert_allclose(metrics["cispo/clip_frac"], expected, rtol=1e-6)


def test_a_batch_without_its_anchor_is_refused_by_name():
    log_probs, _, rewards, mask = make_batch()
    with pytest.raises(TypeError, match="adpo_loss needs anchor_log_probs, an array; given None"):
        adpo_loss(log_probs, None, rewards, mask, num_generations=G)


# What algorithms declare.


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_logs_the_metrics_and_reads_the_log_probs_that_it_declares(name, beta):
    algorithm = ALGORITHMS[name](beta_reference_kl=beta)
    log_probs, anchor, rewards, tokens = folded_batch()
    given = {"policy": log_probs, "anchor": anchor, "reference": anchor, "teacher": anchor}
    given = {whose: given[whose] for whose in algorithm.needs | {"policy"}}

    def loss(given, rewards, tokens):
        return algorithm.loss(given, tokens, algorithm.prepare(rewards, tokens))[1]

    metrics = jax.eval_shape(loss, given, rewards, tokens)
    assert set(metrics) == {metric.name for metric in algorithm.metrics}
    assert {algorithm.loss_metric, algorithm.anchor_kl_metric} <= set(metrics)
    assert ("reference" in algorithm.needs) == bool(beta)


def test_a_parameter_of_several_algorithms_has_a_default_where_they_agree():
    @dataclasses.dataclass(frozen=True)
    class Near(Algorithm):
        name = "near"
        clip_low: float = parameter(0.01, "ratios are clipped at 1 - clip_low", above=0.0)
        rounds: int | None = parameter(None, "rounds", least=1)

    found = {parameter.name: parameter for parameter in union((Grpo, Near, Rloo))}
    assert list(found)[:2] == ["beta_anchor_kl", "beta_reference_kl"]  # those of all come first
    assert list(found["clip_low"].fields) == ["grpo", "near"]
    assert found["clip_low"].default is None
    assert found["clip_low"].meaning == (
        "ratios are clipped at 1 - clip_low; the default is 0.2 for grpo, 0.01 for near"
    )
    assert found["clip_low"].allowed == "above 0 and at most 1 (grpo), above 0 (near)"
    assert (found["clip_high"].default, found["clip_high"].allowed) == (0.2, "above 0")
    assert (found["rounds"].kind, found["rounds"].default) == (int, None)
    assert Near().rounds is None
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        Near(rounds=0)


def test_a_metric_that_is_joined_in_no_known_way_is_refused_where_it_is_declared():
    with pytest.raises(ValueError, match="over, of the metric length, must be one of tokens"):

        class Wrong(Algorithm):
            own_metrics = (Metric("length", "token", "length of a completion"),)


# Transformations.


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_jit_and_vmap_agree_with_plain_calls(loss_fn):
    batches = [make_batch(seed) for seed in range(3)]
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    compiled = [loss_and_metrics(loss_fn, *batch) for batch in batches]
    jax.tree.map(assert_close, compiled[0], loss_fn(*batches[0]))
    stacked = jax.jit(jax.vmap(loss_fn))(*(np.stack(arrays) for arrays in zip(*batches)))
    jax.tree.map(assert_close, stacked, jax.tree.map(lambda *leaves: np.stack(leaves), *compiled))


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_no_gradient_flows_into_the_anchor_or_the_rewards(loss_fn):
    gradients = jax.grad(
        lambda *arguments: loss_fn(*arguments, beta_anchor_kl=0.5)[0], argnums=(1, 2)
    )(*make_batch())
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_inputs_sharded_over_eight_devices_give_the_same_loss_and_gradient(loss_fn, axis_type):
    assert jax.device_count() == 8, "tests/conftest.py sets eight simulated devices"
    batch = make_batch(prompts=8)
    loss, gradient = loss_and_grad(loss_fn, *batch, beta_anchor_kl=0.1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = [
            jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in batch
        ]
        step = jax.jit(lambda *arguments: loss_and_grad(loss_fn, *arguments, beta_anchor_kl=0.1))
        sharded_loss, sharded_gradient = step(*sharded)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-7)


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_float64_inputs_under_x64_give_a_float64_loss(loss_fn):
    with jax.enable_x64(True):
        loss, metrics = loss_and_metrics(loss_fn, *make_batch())
        assert loss.dtype == jnp.float64
        assert {value.dtype for value in metrics.values()} == {jnp.dtype("float64")}
    loss, metrics = loss_and_metrics(loss_fn, *make_batch())
    assert {value.dtype for value in metrics.values()} == {jnp.dtype("float32")}
    assert all(value.shape == () for value in metrics.values())


def test_the_loss_keeps_the_strictest_promotion_rules():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for loss_fn in (adpo_loss, grpo_loss):
            log_probs, anchor, rewards, mask = make_batch()
            loss, _ = loss_and_metrics(loss_fn, log_probs, anchor, rewards, mask > 0)
            assert np.isfinite(loss)


# Refusals.


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_trailing_rows_are_ignored_with_a_warning_and_have_no_gradient(loss_fn):
    batch = make_batch()
    extra = [np.concatenate([array, array[:3] + 1]) for array in batch]
    loss, gradient = loss_and_grad(loss_fn, *batch)
    with pytest.warns(UserWarning, match="3 of 35 rows are left out .* must be adjacent"):
        longer_loss, longer = loss_and_grad(loss_fn, *extra)
    assert longer_loss == loss
    np.testing.assert_array_equal(longer, np.concatenate([gradient, np.zeros((3, T))]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tau": 0.0}, "tau must be a finite number above 0, got 0.0"),
        ({"tau": math.nan}, "tau must be a finite number above 0, got nan"),
        ({"tau": "warm"}, "tau must be .* got 'warm'"),
        ({"beta_reward": -1}, "beta_reward must be"),
        ({"beta_reward": math.inf}, "beta_reward must be"),
        ({"adaptive_tau_alpha": -0.1}, "adaptive_tau_alpha must be at least 0"),
        ({"adaptive_tau_min": 0}, "adaptive_tau_min must be"),
        ({"beta_anchor_kl": -1e-3}, "beta_anchor_kl must be at least 0"),
        ({"min_reward_std": -1}, "min_reward_std must be"),
        ({"scale_rewards": "prompt"}, "one of group, batch, none; got 'prompt'"),
        ({"num_generations": 1}, "num_generations must be a whole number of at least 2, got 1"),
        ({"num_generations": 2.5}, "num_generations must be"),
        ({"num_generations": None}, "num_generations must be"),
        ({"tau": "0.8"}, "tau must be a finite number above 0, fixed at trace time|tau must be"),
        ({"use_adaptive_tau": "false"}, "use_adaptive_tau must be True or False, got 'false'"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights go with several kinds of rewards"),
        ({"num_generations": 64}, "32 rows, fewer than one group of num_generations=64"),
    ],
)
def test_adpo_refuses_what_cannot_work(options, text):
    with pytest.raises(ValueError, match=text):
        jax.jit(lambda *batch: adpo_loss(*batch, **options))(*make_batch())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip_low": 0.0}, "clip_low must be a finite number above 0"),
        ({"clip_low": 1.5}, "clip_low must be a finite number above 0 and at most 1, got 1.5"),
        ({"clip_high": -1}, "clip_high must be"),
        ({"beta_anchor_kl": -1}, "beta_anchor_kl must be"),
        ({"min_reward_std": math.nan}, "min_reward_std must be"),
        ({"scale_rewards": "prompt"}, "one of group, batch, none"),
        (
            {"loss_aggregation": "constant", "constant_length": 2.5},
            "constant_length must be a whole number, got 2.5",
        ),
        ({"loss_aggregation": "mean"}, "one of token-mean, sequence-mean, constant; got 'mean'"),
    ],
)
def test_grpo_refuses_what_cannot_work(options, text):
    with pytest.raises(ValueError, match=text):
        grpo_loss(*make_batch(), **options)


@pytest.mark.parametrize("loss_fn", [adpo_loss, grpo_loss])
def test_mismatched_shapes_are_refused_with_both_shapes(loss_fn):
    log_probs, anchor, rewards, mask = make_batch()
    with pytest.raises(ValueError, match=r"anchor_log_probs must have shape \(32, 6\).*\(32, 5\)"):
        loss_fn(log_probs, anchor[:, :5], rewards, mask)
    with pytest.raises(ValueError, match=r"completion_mask must have shape"):
        loss_fn(log_probs, anchor, rewards, mask[:8])
    with pytest.raises(ValueError, match=r"rewards must have shape \(32,\).*\(8,\)"):
        loss_fn(log_probs, anchor, rewards[:8], mask)
    with pytest.raises(ValueError, match=r"must have shape \(32,\), .*got \(4, 8\): flatten"):
        loss_fn(log_probs, anchor, rewards.reshape(4, 8), mask)
    with pytest.raises(ValueError, match=r"log_probs must be \[B, T\]"):
        loss_fn(log_probs[0], anchor[0], rewards[0], mask[0])


def test_a_number_of_generations_that_jit_traces_is_refused_with_the_cure():
    wanted = 'one that is traced: give jax.jit static_argnames="num_generations"'
    with pytest.raises(ValueError, match=wanted):
        jax.jit(adpo_loss)(*make_batch(), num_generations=8)
    jax.jit(adpo_loss, static_argnames="num_generations")(*make_batch(), num_generations=8)


def test_the_pieces_refuse_groups_that_do_not_fit():
    with pytest.raises(ValueError, match=r"at least 2 completions in it, got shape \(4, 1\)"):
        Adpo().score(jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"tokens are of 3 prompts, the rewards of 2"):
        Grpo().prepare(jnp.zeros((2, 3)), PaddedTokens(jnp.ones((3, 2, 5), bool)))
    with pytest.raises(ValueError, match=r"adaptive_tau_max=1\.0 has no effect"):
        Adpo(adaptive_tau_max=1.0)
    with pytest.raises(ValueError, match="adaptive_tau_mode must be one of"):
        Adpo(adaptive_tau_mode="entropy")
