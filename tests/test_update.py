import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from parsing import parse

from adpo_jax import Engine, SamplingParams, losses, train, update
from adpo_jax.devices import offload, sharding
from adpo_jax.dry_run.hlo import Program
from adpo_jax.policy import Policy
from adpo_jax.records import Sequences
from adpo_jax.run import setup
from adpo_jax.update import optimizer
from adpo_jax.update.anchor import MODES, Anchor
from adpo_jax.update.learner import Learner
from adpo_jax.update.packing import pack
from adpo_jax.update.plan import BatchPlan

SGD = optax.sgd(1.0)
FOLLOWS_ENTROPY = losses.Adpo(adaptive_tau_mode="policy_entropy")
SCHEDULE = optax.constant_schedule(1e-3)


def step(policy, params, batch, rewards, *, num_micro=1, algorithm=None, log_probs=None, put=None):
    """One SGD step of rate 1, so that parameters show the gradient."""
    algorithm = algorithm or losses.Adpo()
    scores = jax.device_get(algorithm.score(jnp.asarray(rewards)))
    run = update.make_update(policy, algorithm, SGD, num_micro=num_micro)
    state = update.init_state(policy, jax.tree.map(jnp.copy, params), SGD)
    put = put or (lambda tree: jax.tree.map(jnp.asarray, tree))
    state, metrics = run(state, *put((batch, scores, log_probs)))
    return jax.device_get(state.params), jax.device_get(metrics)


def assert_same(one, other, rtol=1e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


@pytest.mark.parametrize(
    "algorithm",
    [
        losses.Adpo(drop_all_failed_prompts=True, beta_anchor_kl=0.1, scale_rewards="batch"),
        losses.Grpo(beta_anchor_kl=0.1),
        losses.Grpo(loss_aggregation="sequence-mean"),
        losses.Rloo(beta_anchor_kl=0.1),
        losses.Tpo(sampler_correction="truncate", entropy_bonus=0.2),
    ],
    ids=["adpo", "grpo", "grpo sequence-mean", "rloo", "tpo"],
)
def test_micro_batches_give_the_gradient_and_metrics_of_the_whole_batch(algorithm):
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    rewards[2] = -np.abs(rewards[2])  # a failed prompt
    anchor = np.random.default_rng(1).normal(-3.0, 0.3, batch.completion_mask_PGT.shape)
    given = {"algorithm": algorithm, "log_probs": {"anchor": anchor.astype(np.float32)}}
    whole = step(policy, params, batch, rewards, **given)
    for num_micro in (2, 8):
        split = step(policy, params, batch, rewards, **given, num_micro=num_micro)
        assert_same(whole, split)


def test_without_anchor_log_probs_the_anchor_is_the_policy_itself():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    log_probs, _ = update.make_log_probs(policy, num_micro=2)(params, batch)
    given = {"anchor": np.asarray(log_probs)}
    explicit = step(policy, params, batch, rewards, log_probs=given)
    implicit = step(policy, params, batch, rewards)
    assert_same(explicit[0], implicit[0])
    assert implicit[1]["adpo/loss"] == pytest.approx(np.log(4), rel=1e-6)
    assert implicit[1]["adpo/anchor_kl"] == 0.0


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_an_update_on_eight_devices_equals_one_on_one_device(sizes):
    batch, rewards = tiny.batch()
    policy, params = tiny.policy_and_params()
    expected = step(policy, params, batch, rewards)
    mesh = sharding.make_mesh(*sizes)
    sharded_policy = dataclasses.replace(policy, mesh=mesh)
    layout = jax.tree.map(lambda s: s.sharding, sharded_policy.abstract_params())
    found = step(
        sharded_policy,
        jax.device_put(params, layout),
        batch,
        rewards,
        put=sharding.BatchSharding(mesh).put,
    )
    assert_same(expected, found, rtol=1e-4, atol=1e-5)


def test_a_gradient_crosses_between_slices_once_an_optimizer_step():
    mesh = sharding.make_mesh(2, 2, 2)
    policy, params = tiny.policy_and_params(mesh)
    batch, rewards = tiny.batch()
    packed = pack(batch, num_shards=4, completions_per_micro=2, tile=4)
    assert packed.num_micro_B[0] > 1
    algorithm, optimizer = losses.Adpo(), optax.sgd(1.0)
    state = update.init_state(policy, params, optimizer)
    given = sharding.BatchSharding(mesh).put((packed, algorithm.judge(jnp.asarray(rewards))))
    compiled = update.make_update(policy, algorithm, optimizer).lower(state, *given, {}).compile()
    found = Program(compiled.as_text(), 7, [0, 0, 0, 0, 1, 1, 1, 1]).collectives
    inside, across = ([c for c in found if c.crosses == crosses] for crosses in (False, True))
    assert max(c.calls for c in inside) >= 7
    assert max(c.calls for c in across) < 7
    # A device has a quarter of the parameters; log-probs and metrics are a few numbers more.
    size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert size <= sum(c.bytes for c in across) < 2 * size


def test_optimizer_state_is_born_with_the_layout_of_the_parameters():
    mesh = sharding.make_mesh(1, 4, 2)
    policy, params = tiny.policy_and_params(mesh)
    adamw = optimizer.make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.1, grad_clip=1.0)
    state = update.init_state(policy, params, adamw)
    mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    same = jax.tree.map(lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim), mu, params)
    assert all(jax.tree.leaves(same))
    assert "tensor" in str(mu["layers"]["q"].sharding.spec)
    abstract = update.abstract_state(policy, adamw)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


def is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)


def test_the_learning_rate_of_a_cold_start_falls_along_a_cosine_to_a_tenth(monkeypatch):
    made, make_schedule = [], optimizer.make_schedule

    def kept(*args, **kwargs):
        made.append(make_schedule(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(optimizer, "make_schedule", kept)
    sft = {"lr": 0.01, "lr_warmup_steps": 0, "steps": 40}
    setup.make_cold_start_optimizer(parse(*(f"--config.sft.{k}={v}" for k, v in sft.items())))
    quarter = 0.001 + 0.009 * (1 + 0.5**0.5) / 2
    rates = [float(made[0](step)) for step in (0, 10, 20, 40)]
    assert rates == pytest.approx([0.01, quarter, 0.0055, 0.001])


def test_adamw_after_a_clip_by_global_norm_by_hand():
    params = {"embed": jnp.array([0.5, -2.0]), "final_norm": jnp.ones(1)}
    rate, b1, b2 = 0.1, 0.5, 0.9
    adamw = optimizer.make_optimizer(
        optax.constant_schedule(rate), weight_decay=0.0, grad_clip=1.0, b1=b1, b2=b2
    )
    state, m, v = adamw.init(params), np.zeros(3), np.zeros(3)
    for t, g in enumerate((np.array([3.0, 4.0, 12.0]), np.array([0.3, -0.4, 0.0])), 1):
        gradient = {"embed": jnp.array(g[:2]), "final_norm": jnp.array(g[2:])}
        updates, state = adamw.update(gradient, state, params)
        g = g / max(1.0, np.linalg.norm(g))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        wanted = -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        found = np.concatenate([updates["embed"], updates["final_norm"]])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_weight_decay_leaves_norms_and_biases_alone():
    params = Policy(tiny.model_config(qk_norm=True, qkv_bias=True)).init(jax.random.key(0))
    params = jax.tree.map(jnp.ones_like, params)  # a bias of 0 cannot decay
    adamw = optimizer.make_optimizer(optax.constant_schedule(1.0), weight_decay=0.5, grad_clip=0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = adamw.update(zeros, adamw.init(params), params)
    decayed = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert decayed["layers"]["q"]
    assert decayed["embed"]
    assert not decayed["layers"]["attn_norm"]
    assert not decayed["layers"]["q_norm"]
    assert not decayed["layers"]["q_bias"]
    assert not decayed["final_norm"]


def test_the_schedule_warms_up_and_decays_to_its_floor():
    rate = optimizer.make_schedule(
        2.0, warmup_steps=4, total_steps=14, kind="cosine", min_lr_ratio=0.1
    )
    assert [float(rate(i)) for i in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert float(rate(4)) == pytest.approx(2.0)
    assert float(rate(6.5)) == pytest.approx(0.2 + 1.8 * (1 + 0.5**0.5) / 2)
    assert float(rate(14)) == pytest.approx(0.2)
    linear = optimizer.make_schedule(2.0, warmup_steps=0, total_steps=10, kind="linear")
    assert float(linear(5)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="lr_scheduler_type is one of"):
        optimizer.make_schedule(1.0, warmup_steps=0, total_steps=1, kind="sine")
    with pytest.raises(ValueError, match="warms up over 5 steps, but there are 2"):
        optimizer.make_schedule(1.0, warmup_steps=5, total_steps=2, kind="constant")


def make_learner(policy, *, anchor=None, mini=8, epochs=1, algorithm=None, lr=0.01):
    return Learner(
        policy=policy,
        algorithm=algorithm or losses.Adpo(),
        optimizer=optax.sgd(lr),
        schedule=optax.constant_schedule(lr),
        anchor=anchor or Anchor(),
        plan=BatchPlan(num_prompts=8, mini_prompts=mini, micro_prompts=mini, epochs=epochs),
    )


def test_in_bfloat16_the_sampler_and_the_trainer_differ_by_rounding_alone():
    """Whatever the sampler cut off."""
    policy, params = tiny.policy_and_params(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    engine = Engine(policy, max_prompt_length=5, max_response_length=16, num_slots=32)
    sampling = SamplingParams(n=4, max_tokens=16, top_p=0.7, full_log_probs=True)
    prompts = [[1 + i, 2, 3] for i in range(8)]
    out = engine.generate(params, prompts, sampling, jax.random.key(0))
    learner, rewards = make_learner(policy), np.eye(8, 4, dtype=np.float32)

    def mismatch(out):
        started = learner.init_state(jax.tree.map(jnp.copy, params))
        sequences = Sequences(prompts, out.groups)
        return learner.learn(started, sequences, rewards)[1]["rollout/mismatch_kl"]

    assert mismatch(out) < 1e-3
    truncated = out.map(lambda c: dataclasses.replace(c, full_log_probs=None))
    assert mismatch(truncated) > 1e-2


def test_the_trainer_tempers_as_the_sampler_does():
    policy, params = tiny.policy_and_params()
    engine = Engine(policy, max_prompt_length=5, max_response_length=16, num_slots=32)
    prompts = [[1 + i, 2, 3] for i in range(8)]
    sampling = SamplingParams(n=4, max_tokens=16, temperature=0.7)
    out = engine.generate(params, prompts, sampling, jax.random.key(0))

    def mismatch(temperature):
        learner = dataclasses.replace(make_learner(policy), temperature=temperature)
        state = learner.init_state(jax.tree.map(jnp.copy, params))
        rewards = np.eye(8, 4, dtype=np.float32)
        _, metrics = learner.learn(state, Sequences(prompts, out.groups), rewards)
        return metrics["rollout/mismatch_kl"]

    assert mismatch(0.7) < 1e-5
    assert mismatch(1.0) > 1e-2


def test_one_update_needs_no_anchor_forward_and_more_need_one():
    policy, _ = tiny.policy_and_params()
    assert not make_learner(policy).needs_anchor_forward
    assert make_learner(policy, mini=4).needs_anchor_forward
    assert make_learner(policy, epochs=2).needs_anchor_forward
    assert make_learner(policy, anchor=Anchor("fixed")).needs_anchor_forward
    assert make_learner(policy, algorithm=FOLLOWS_ENTROPY).needs_anchor_forward


class StillLearner(Learner):
    """Finds log-probs under other policies without a model."""

    def log_probs(self, params, sequences, forward=None):
        values = [[np.zeros(len(c.tokens)) for c in group] for group in sequences.completions]
        return values, values


@pytest.mark.parametrize("mode", MODES)
def test_the_named_other_policies_are_those_whose_log_probs_are_found(mode):
    policy, params = tiny.policy_and_params()
    sequences, _ = tiny.sequences()
    fixed = {"teacher": policy, "reference": policy}
    for algorithm, names, mini in itertools.product(
        (losses.Adpo(), FOLLOWS_ENTROPY, losses.Grpo(beta_reference_kl=0.1), losses.Opd()),
        ((), fixed),
        (8, 4),
    ):
        made = make_learner(policy, anchor=Anchor(mode), algorithm=algorithm, mini=mini)
        learner = StillLearner(
            **{f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
            | {"fixed": {name: fixed[name] for name in names}}
        )
        state = learner.init_state(jax.tree.map(jnp.copy, params))
        state = state.replace(fixed_params=dict.fromkeys(names))
        found, _ = learner._other_log_probs(state, sequences)
        assert set(found) == set(learner.other_policies)


def test_several_updates_measure_against_the_first_parameters_of_the_iteration():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    learner = make_learner(policy, epochs=3, lr=0.01)
    state, metrics = learner.learn(learner.init_state(params), batch.sequences(), rewards)
    assert int(state.step) == 1
    assert metrics["adpo/anchor_kl"] > 0.0
    assert metrics["adpo/loss"] < np.log(4)  # repeated steps towards the target lower it


def test_every_prompt_is_in_one_mini_batch_an_epoch_and_the_order_follows_seed_and_step():
    policy, _ = tiny.policy_and_params()
    learner = make_learner(policy, mini=2, epochs=2)
    orders = [np.concatenate(list(learner._mini_batches(step))) for step in (0, 0, 1)]
    assert sorted(orders[0]) == sorted(list(range(8)) * 2)
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


def test_grpo_clips_against_the_old_policy_and_is_pulled_to_a_fixed_reference_at_once():
    policy, params = tiny.policy_and_params()
    sequences, rewards = tiny.sequences()
    pulled = losses.Grpo(beta_reference_kl=0.5)
    learner = make_learner(policy, epochs=2, algorithm=pulled, lr=0.5)
    state = learner.init_state(jax.tree.map(jnp.copy, params))
    for _ in range(3):
        state, metrics = learner.learn(state, sequences, rewards)
    # The ratios are to the policy before the iteration, the pull is to that of before the first.
    assert metrics["grpo/reference_kl"] > 2 * metrics["grpo/anchor_kl"] > 0
    jax.tree.map(np.testing.assert_array_equal, state.reference_params, params)

    free = make_learner(policy, epochs=2, algorithm=losses.Grpo(), lr=0.5)
    assert free.init_state(jax.tree.map(jnp.copy, params)).reference_params is None
    loose = free.init_state(jax.tree.map(jnp.copy, params))
    for _ in range(3):
        loose, _ = free.learn(loose, sequences, rewards)

    def moved(state):
        return float(np.abs(np.asarray(state.params["embed"] - params["embed"])).max())

    assert moved(state) < moved(loose)


def test_a_fixed_anchor_is_the_reference_and_is_kept_once():
    policy, params = tiny.policy_and_params()
    sequences, rewards = tiny.sequences()
    algorithm = losses.Adpo(beta_reference_kl=0.1)
    learner = make_learner(policy, anchor=Anchor("fixed"), algorithm=algorithm, lr=0.5)
    state, _ = learner.learn(learner.init_state(params), sequences, rewards)
    state, metrics = learner.learn(state, sequences, rewards)
    assert state.reference_params is None
    assert metrics["adpo/reference_kl"] == metrics["adpo/kl_penalty"] > 0


def test_policy_entropy_sets_tau():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    learner = make_learner(policy, algorithm=FOLLOWS_ENTROPY)
    _, metrics = learner.learn(learner.init_state(params), batch.sequences(), rewards)
    assert 0.8 < metrics["adpo/mean_tau"] <= 0.8 * 1.5
    # The forward for the entropy is another program: its log-probs are not those of the step.
    assert "anchor" not in learner.other_policies
    assert metrics["adpo/abs_log_ratio"] == 0.0


def test_anchor_modes_follow_the_policy_as_documented():
    before, after = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    fixed, ema = Anchor("fixed"), Anchor("ema", ema_alpha=0.75)
    kl = Anchor("kl_triggered", kl_threshold=0.1)
    assert Anchor().init(before) is None
    assert fixed.refresh(before, after, measured_kl=9.0) == (before, False)
    moved, _ = ema.refresh(before, after, measured_kl=0.0)
    np.testing.assert_allclose(moved["w"], 0.25)
    kept, renewed = kl.refresh(before, after, measured_kl=0.05)
    assert (kept is before, renewed) == (True, False)
    copied, renewed = kl.refresh(before, after, measured_kl=0.2)
    assert renewed
    assert copied["w"].unsafe_buffer_pointer() != after["w"].unsafe_buffer_pointer()


def test_anchor_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="anchor.mode is one of"):
        Anchor("momentum")
    with pytest.raises(ValueError, match="ema_alpha is in"):
        Anchor("ema", ema_alpha=1.5)
    with pytest.raises(ValueError, match="kl_threshold is > 0"):
        Anchor("kl_triggered", kl_threshold=0.0)


@pytest.mark.parametrize("mode", ["fixed", "ema", "kl_triggered"])
def test_a_kept_anchor_survives_the_donation_of_the_state(mode):
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    anchor = Anchor(mode, ema_alpha=0.5, kl_threshold=1e-9)
    learner = make_learner(policy, anchor=anchor, lr=0.5)
    state = learner.init_state(params)
    first = jax.device_get(state.anchor_params)
    for _ in range(2):
        state, metrics = learner.learn(state, batch.sequences(), rewards)
    last = jax.device_get(state.anchor_params)
    moved = float(np.abs(last["embed"] - first["embed"]).max())
    assert (moved == 0.0) == (mode == "fixed")
    assert metrics["adpo/anchor_kl"] > 0.0


def test_a_step_that_is_not_sound_leaves_the_state_as_it_was():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    learner = make_learner(policy, anchor=Anchor("ema", ema_alpha=0.5), lr=0.5)
    state, metrics = learner.learn(learner.init_state(params), batch.sequences(), rewards)
    assert metrics["anchor/renewed"] == 1.0
    before = jax.device_get(state)  # policy and anchor are apart: a moving average would move
    state, metrics = learner.learn(
        state, batch.sequences(), np.where(rewards > 1.0, np.inf, rewards)
    )
    assert metrics["update/skipped"] == 1.0
    assert not np.isfinite(metrics["update/grad_norm"])
    assert metrics["anchor/renewed"] == 0.0
    for name in ("params", "opt_state", "anchor_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    state, metrics = learner.learn(state, batch.sequences(), rewards)
    assert metrics["update/skipped"] == 0.0
    assert int(state.step) == 3


class FiniteLossAlone(losses.Rloo):
    """Its loss is a number, and the gradient of that loss is none."""

    def objective(self, log_ratio, tokens, prepared, log_probs):
        loss, metrics = super().objective(log_ratio, tokens, prepared, log_probs)
        return loss + jnp.sqrt(tokens.sum(log_ratio**2).sum()), metrics  # 0, with a slope of 0 / 0


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    moved, metrics = step(policy, params, batch, rewards, algorithm=FiniteLossAlone())
    assert np.isfinite(metrics["rloo/loss"])
    assert not np.isfinite(metrics["update/grad_norm"])
    assert metrics["update/skipped"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_the_mismatch_is_the_divergence_of_the_trainer_from_the_sampler():
    """KL(sampler || trainer), estimated over what the sampler drew: r - 1 - log r, r = p / p_s."""
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    log_probs, _ = update.make_log_probs(policy)(params, batch)
    lower = np.asarray(log_probs) - 0.7  # the sampler found every token half as likely
    _, metrics = step(policy, params, batch._replace(sampler_log_probs_PGT=lower), rewards)
    assert metrics["rollout/mismatch_kl"] == pytest.approx(np.exp(0.7) - 1 - 0.7, rel=1e-4)
    assert metrics["rollout/mismatch_ratio_max"] == pytest.approx(np.exp(0.7), rel=1e-4)


def test_micro_batches_of_each_replica_are_of_whole_prompts():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    policy, params = tiny.policy_and_params(mesh)
    batch, rewards = tiny.batch()
    with pytest.raises(ValueError, match="num_micro=4 must divide the 2 prompts of each of the 4"):
        step(policy, params, batch, rewards, num_micro=4)


def test_what_is_given_in_a_wrong_place_is_told_in_words():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    algorithm = losses.Adpo()
    run = update.make_update(policy, algorithm, SGD)
    state = update.init_state(policy, params, SGD)
    scores = algorithm.score(jnp.asarray(rewards))
    engine, one = Engine(policy, max_prompt_length=4, max_response_length=4), SamplingParams()
    one = dataclasses.replace(one, max_tokens=4)
    for call, text in (
        (lambda: update.init_state(params, policy, SGD), "policy is a Policy .* given dict"),
        (lambda: update.init_state(policy, params, None), "optimizer is a GradientTransf"),
        (lambda: update.make_update(policy, losses.Adpo, SGD), "algorithm .* with its brackets"),
        (lambda: run(params, batch, scores, None), "state is a TrainState .* given dict"),
        (lambda: run(state, batch._asdict(), scores, None), "batch is a .* given dict"),
        (lambda: run(state, batch, rewards, None), r"scores is what Adpo.score makes of rewards"),
        (lambda: run(state, batch, scores, rewards), "log_probs is a dict .* given"),
        (lambda: run(state, batch, scores, {"old": rewards}), "'old': known are anchor, sampler"),
        (lambda: run(state, batch, scores, {"anchor": rewards}), r"\(8, 4, 6\); given \(8, 4\)"),
        (
            lambda: update.make_update(policy, algorithm, SGD, num_micro=3)(
                state, batch, scores, None
            ),
            "num_micro=3 must divide the number of prompts, 8",
        ),
        (lambda: Engine((policy, params), max_prompt_length=4, max_response_length=4),
         "given tuple. The parameters go to `generate`"),
        (lambda: Engine(policy, max_prompt_length=0, max_response_length=4),
         "max_prompt_length is a whole number, 1 or more; given 0"),
        (lambda: Engine(policy, max_prompt_length="a", max_response_length=4),
         "max_prompt_length is a whole number, 1 or more; given 'a'"),
        (lambda: SamplingParams(max_tokens="a"), "max_tokens is a whole number; given 'a'"),
        (lambda: engine.generate(None, [[1]], one, jax.random.key(0)),
         "params is the policy's parameter tree, .* given NoneType"),
        (lambda: engine.generate(params, [[1]], one, 0), r"key is a jax.random.key.* given int"),
        (lambda: engine.session(params, one, 0), r"key is a jax.random.key.* given int"),
        (lambda: update.init_state(policy, None, SGD), "parameter tree, .* given NoneType"),
        (lambda: update.make_update(policy, algorithm, SGD, num_micro=0),
         "num_micro is a whole number, 1 or more; given 0"),
        (lambda: update.make_update(policy, algorithm, SGD, router_aux_loss_coef=0.1),
         "router_aux_loss_coef .* the model has none"),
        (lambda: policy.logits(params, jnp.array([[1, 10**6]])), "token ids .*; given 0 to 10"),
        (lambda: policy.logits(params, jnp.array([[0.5]])), "whole numbers, int32; given float32"),
        (lambda: policy.logits(params, [[0.5]]), "whole numbers, int32; given float64"),
        (lambda: train(None, callbacks=print), "callbacks is a list of functions; given <built-in"),
        (lambda: train(None, callbacks=(x for x in "a")), "list of functions; given <g"),
        (lambda: train._call([lambda _: {"a": "b"}], 1, None, None, {}),
         "callback <lambda> returns a dict of numbers by name, or None; it returned {'a': 'b'}"),
        (lambda: losses.adpo_loss(rewards, rewards, rewards[:, 0], None),
         "adpo_loss needs completion_mask, an array; given None"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def test_the_learning_rate_told_is_that_of_the_last_step_taken():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    adamw = optimizer.make_optimizer(schedule, weight_decay=0.0, grad_clip=1.0)
    learner = dataclasses.replace(make_learner(policy), optimizer=adamw, schedule=schedule)
    state, rates = learner.init_state(params), []
    for given in (rewards, np.full_like(rewards, np.nan), rewards):
        state, metrics = learner.learn(state, batch.sequences(), given)
        rates.append(metrics["update/lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.9])


def test_arithmetic_of_the_model_leaves_out_what_is_recomputed():
    batch, rewards = tiny.batch()
    found = {}
    for remat in ("none", "full"):
        policy, params = tiny.policy_and_params(gradient_checkpointing=remat)
        learner = make_learner(policy)
        scores = learner.algorithm.score(jnp.asarray(rewards))
        part = (learner.laid_out(batch.sequences()).batch, scores, None)
        found[remat] = learner.meter.operations((learner.init_state(params), *part), 1)
    assert found["none"]["update/mfu"] == found["none"]["update/hfu"] == found["full"]["update/mfu"]
    assert found["full"]["update/hfu"] > 1.1 * found["full"]["update/mfu"]


def test_the_anchor_forward_runs_in_micro_batches_of_the_update():
    policy, _ = tiny.policy_and_params()
    batch, _ = tiny.batch()
    plan = BatchPlan(num_prompts=8, mini_prompts=2, micro_prompts=2, epochs=1)
    learner = dataclasses.replace(make_learner(policy), plan=plan)
    sequences = batch.sequences()
    anchor, update = (learner.laid_out(s).batch for s in (sequences, sequences.select([0, 1])))
    assert anchor.micro.tokens.shape[-1] <= 1.5 * update.micro.tokens.shape[-1]
    assert anchor.num_micro_B[0] > 1


def test_a_step_beyond_the_largest_anchor_kl_is_skipped():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    for limit, skipped in ((1e-6, 1.0), (10.0, 0.0)):
        learner = make_learner(policy, anchor=Anchor("fixed"), lr=0.5)
        learner = dataclasses.replace(learner, max_anchor_kl=limit)
        state = learner.init_state(jax.tree.map(jnp.copy, params))
        state, metrics = learner.learn(state, batch.sequences(), rewards)
        assert metrics["update/skipped"] == 0.0  # the anchor is the policy
        state, metrics = learner.learn(state, batch.sequences(), rewards)
        assert metrics["update/skipped"] == skipped


@pytest.mark.parametrize(
    ("algorithm", "names"),
    [
        (
            losses.Adpo(drop_all_failed_prompts=True),
            ("rollout/entropy", "update/tokens", "adpo/mean_tau"),
        ),
        (
            losses.Grpo(drop_all_failed_prompts=True, beta_reference_kl=0.1, entropy_bonus=0.1),
            ("grpo/reference_kl", "grpo/entropy_bonus", "grpo/loss", "update/kept_tokens"),
        ),
        (
            losses.ReinforcePp(drop_all_failed_prompts=True, loss_aggregation="sequence-mean"),
            ("reinforce_pp/loss",),
        ),
    ],
    ids=["adpo", "grpo", "sequence-mean"],
)
def test_mini_batches_do_not_change_counts_and_means(algorithm, names):
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    rewards[[1, 4, 6]] = -1.0
    found = []
    for mini in (8, 1):
        learner = make_learner(policy, mini=mini, algorithm=algorithm, lr=0.0)
        state = learner.init_state(jax.tree.map(jnp.copy, params))
        if learner.keeps_reference:
            state = state.replace(reference_params=jax.tree.map(lambda x: x / 2, params))
        found.append(learner.learn(state, batch.sequences(), rewards)[1])
    for name in (f"{algorithm.name}/dropped_prompts", *names):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name
    dropped = (rewards <= 0).all(axis=1).sum()
    assert 8 > dropped == found[0][f"{algorithm.name}/dropped_prompts"] > 2
    assert found[0]["update/kept_prompts"] == 8 - dropped


def test_the_state_keeps_its_layout_on_a_mesh():
    mesh = sharding.make_mesh(1, 4, 2)
    policy, params = tiny.policy_and_params(mesh)
    adamw = optimizer.make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.1, grad_clip=1.0)
    learner = dataclasses.replace(make_learner(policy), optimizer=adamw)
    wanted = learner.abstract_state()
    state = learner.init_state(params)
    for seed in range(2):
        batch, rewards = tiny.batch(seed=seed)
        state, _ = learner.learn(state, batch.sequences(), rewards)
    same = jax.tree.map(
        lambda x, w: x.dtype == w.dtype and x.sharding.is_equivalent_to(w.sharding, x.ndim),
        state,
        wanted,
    )
    assert all(jax.tree.leaves(same))


def test_an_update_of_rows_compiles_once_a_run():
    policy, params = tiny.policy_and_params()
    learner = make_learner(policy, mini=4, epochs=2)
    plan = dataclasses.replace(learner.plan, layout="rows", prompt_length=5, completion_length=6)
    learner = dataclasses.replace(learner, plan=plan)
    state = learner.init_state(params)
    for seed in range(3):
        batch, rewards = tiny.batch(seed=seed)
        state, _ = learner.learn(state, batch.sequences(), rewards)
    assert learner.update._cache_size() == 1
    assert learner.forward._cache_size() == 1


def test_state_that_waits_on_the_host_changes_nothing_but_its_place():
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    states = []
    for on_host in (False, True):
        anchor = Anchor("ema", ema_alpha=0.5, offload=on_host)
        adamw = optimizer.make_optimizer(SCHEDULE, weight_decay=0.1, grad_clip=1.0)
        learner = dataclasses.replace(
            make_learner(policy, anchor=anchor), optimizer=adamw, offload_optimizer=on_host
        )
        state = learner.init_state(jax.tree.map(jnp.copy, params))
        for _ in range(2):
            state, _ = learner.learn(state, batch.sequences(), rewards)
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *states)
    away = (states[1].opt_state, states[1].anchor_params)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(states[1].params)} == {"device"}
    # Of a CPU this is the same memory, which the cache cannot have.
    assert learner.parts_on_host == frozenset()


def test_an_anchor_in_bfloat16_beside_a_policy_that_is_equal_stays_there():
    params = {"w": jnp.linspace(-3.0, 3.0, 101, dtype=jnp.bfloat16)}
    ema = Anchor("ema", ema_alpha=0.99)
    anchor = ema.init(params)
    for _ in range(50):
        anchor, _ = ema.refresh(anchor, params, measured_kl=0.0)
    np.testing.assert_array_equal(anchor["w"], params["w"])


def test_offload_is_refused_where_there_is_no_pinned_host_memory():
    class Memory:
        kind = "device"

    class Device:
        device_kind = "toaster"

        def addressable_memories(self):
            return [Memory()]

    with pytest.raises(ValueError, match="anchor.offload needs a platform with pinned_host"):
        offload.check(Device(), "anchor.offload")


def test_the_first_moment_has_its_own_dtype_and_parameters_stay_float32():
    mesh = sharding.make_mesh()
    policy, params = tiny.policy_and_params(mesh, dtype="bfloat16", param_dtype="float32")
    adamw = optimizer.make_optimizer(SCHEDULE, weight_decay=0.1, grad_clip=1.0, mu_dtype="bfloat16")
    learner = dataclasses.replace(make_learner(policy), optimizer=adamw)
    batch, rewards = tiny.batch()
    state, metrics = learner.learn(learner.init_state(params), batch.sequences(), rewards)
    dtypes = [[x.dtype for x in jax.tree.leaves(s)] for s in (learner.abstract_state(), state)]
    assert dtypes[0] == dtypes[1]  # what a checkpoint is restored as
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((adam.nu, state.params))} == {jnp.dtype("float32")}
    assert np.isfinite(metrics["update/grad_norm"])
    with pytest.raises(ValueError, match="mu_dtype is float32 or bfloat16"):
        optimizer.make_optimizer(SCHEDULE, weight_decay=0.1, grad_clip=1.0, mu_dtype="int8")


def test_a_metric_that_some_steps_lack_is_that_of_the_others():
    declared = (*update.METRICS, *update.MIXTURE_METRICS)
    counts = [
        {"update/tokens": n, "update/kept_tokens": n, "update/kept_prompts": 1} for n in (1, 3)
    ]
    for replayed in ({}, {"router/replay_changed_frac": 0.5}), ({"router/busiest": 2.0}, {}):
        history = [count | more for count, more in zip(counts, replayed)]
        metrics = update.averaged_metrics(declared, history, epochs=1)
        (name,) = metrics.keys() - counts[0].keys()
        assert metrics[name] == max(replayed, key=len)[name]
        assert metrics["update/tokens"] == 4
