"""Adapters against the formula and merged weights, in the update and in the engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adpo_jax import Engine, Policy, SamplingParams, losses, update
from adpo_jax.devices import sharding
from adpo_jax.model import lora
from adpo_jax.model.lora import Lora
from adpo_jax.model.parameters import adaptable, adapter_names, logical_axes
from adpo_jax.update import optimizer
from adpo_jax.update.anchor import Anchor
from adpo_jax.update.learner import Learner
from adpo_jax.update.plan import BatchPlan

LORA = Lora(rank=2, alpha=6.0)


@functools.cache
def adapted(adapters=LORA, *, trained=True, **kwargs):
    """The tiny policy with adapters; B is random where they count as trained."""
    policy, params = tiny.policy_and_params(**kwargs)
    policy, params = policy.with_adapters(params, adapters, jax.random.key(1))
    if not trained:
        return policy, params
    moved, frozen = lora.split(params)
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(adaptable())))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), moved)
    return policy, lora.join(moved, frozen)


def merged_params(policy, params):
    """The plain tree with the adapters added into the weights, one einsum a weight."""
    layers = dict(lora.without_adapters(params)["layers"])
    formulas = {"q": "ldr,lrnh->ldnh", "o": "lnhr,lrd->lnhd", "gate": "ldr,lrf->ldf"}
    formulas |= {"k": formulas["q"], "v": formulas["q"]}
    formulas |= {"up": formulas["gate"], "down": formulas["gate"]}
    for name in policy.lora.targets:
        a, b = lora.adapter_of(params, name)
        layers[name] += policy.lora.alpha / policy.lora.rank * jnp.einsum(formulas[name], a, b)
    return {**params, "layers": layers}


def plain(policy):
    return dataclasses.replace(policy, lora=None)


TOKENS = np.random.default_rng(0).integers(0, 32, (3, 9)).astype(np.int32)


def test_new_adapters_change_nothing_bit_by_bit():
    policy, params = adapted(trained=False)
    base = lora.without_adapters(params)
    np.testing.assert_array_equal(policy.logits(params, TOKENS), plain(policy).logits(base, TOKENS))
    a, b = lora.adapter_of(params, "o")
    assert a.shape == (2, 4, 8, 2)
    assert b.shape == (2, 2, 16)
    bound = 1 / np.sqrt(4 * 8)
    assert 0.8 * bound < np.abs(a).max() <= bound


@pytest.mark.parametrize("targets", [tuple(adaptable()), ("q", "down"), ("o",)])
def test_a_policy_with_adapters_is_the_one_with_merged_weights(targets):
    policy, params = adapted(Lora(2, 6.0, targets))
    merged = plain(policy).logits(merged_params(policy, params), TOKENS)
    np.testing.assert_allclose(policy.logits(params, TOKENS), merged, rtol=0, atol=1e-5)
    base = plain(policy).logits(lora.without_adapters(params), TOKENS)
    assert np.abs(merged - base).max() > 0.1


def test_gradients_of_adapters_are_those_of_the_explicit_sum():
    policy, params = adapted()
    trained, frozen = lora.split(params)

    def loss(trained, forward):
        return jnp.sum(jnp.sin(forward(lora.join(trained, frozen))))

    mask = jnp.ones_like(TOKENS)
    found = jax.jit(jax.grad(lambda t: loss(t, lambda p: policy.hidden(p, TOKENS, mask))))(trained)
    explicit = lambda p: plain(policy).hidden(merged_params(policy, p), TOKENS, mask)  # noqa: E731
    wanted = jax.jit(jax.grad(lambda t: loss(t, explicit)))(trained)
    jax.tree.map(
        lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5 * np.abs(w).max()),
        found,
        wanted,
    )
    assert all(np.any(g) for g in jax.tree.leaves(found))


def test_in_bfloat16_a_frozen_base_of_that_dtype_gives_the_numbers_of_a_float32_one():
    policy, params = adapted(dtype="bfloat16", param_dtype="float32")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.without_adapters(params))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    adapters, _ = lora.split(params)
    half = dataclasses.replace(policy, param_dtype="bfloat16")
    np.testing.assert_array_equal(
        half.logits(lora.join(adapters, narrow), TOKENS),
        policy.logits(lora.join(adapters, wide), TOKENS),
    )


def learner(policy, *, algorithm=None, anchor="on_policy", micro=8, epochs=1):
    rate = optax.constant_schedule(0.02)
    return Learner(
        policy=policy,
        algorithm=algorithm or losses.Adpo(),
        optimizer=optimizer.make_optimizer(rate, weight_decay=0.1, grad_clip=1.0),
        schedule=rate,
        anchor=Anchor(anchor),
        plan=BatchPlan(
            num_prompts=8,
            mini_prompts=8,
            micro_prompts=micro,
            micro_completions=0 if micro == 8 else 4 * micro,
            epochs=epochs,
        ),
    )


@functools.cache
def learn(mesh_sizes=None, remat="none", **kwargs):
    """Two iterations; (the learner, first and last state, metrics)."""
    policy, params = adapted()
    policy = dataclasses.replace(policy, gradient_checkpointing=remat)
    if mesh_sizes:
        policy = dataclasses.replace(policy, mesh=sharding.make_mesh(*mesh_sizes))
        params = jax.device_put(
            params, jax.tree.map(lambda s: s.sharding, policy.abstract_params())
        )
    parts = learner(policy, **kwargs)
    state = parts.init_state(jax.tree.map(jnp.copy, params))
    first = jax.device_get(state)
    for seed in range(2):
        state, metrics = parts.learn(state, *tiny.sequences(seed=seed))
    return parts, first, state, metrics


def changed(before, after):
    """The names of the layers' parameters (and others) that differ in any bit."""
    flat = lambda tree: {**tree, **tree["layers"]}  # noqa: E731
    before, after = flat(before), jax.device_get(flat(after))
    del before["layers"]
    return {name for name in before if not np.array_equal(before[name], after[name])}


ADAPTERS = {n for name in adaptable(tiny.model_config()) for n in adapter_names(name)}


@pytest.mark.parametrize(
    "kwargs", [{"anchor": "fixed"}, {"algorithm": losses.Grpo(), "epochs": 2}], ids=["adpo", "grpo"]
)
def test_learning_moves_the_adapters_and_no_bit_of_the_base(kwargs):
    _, first, last, metrics = learn(**kwargs)
    assert changed(first.params, last.params) == ADAPTERS
    assert np.isfinite(list(metrics.values())).all()
    held = jax.tree.leaves((last.opt_state, last.anchor_params))
    size = sum(x.size for x in jax.tree.leaves(lora.split(last.params)[0]))
    copies = 3 if "anchor" in kwargs else 2  # two moments of Adam, and the anchor
    assert sum(x.size for x in held if x.ndim) == copies * size


def test_a_fixed_anchor_is_the_first_policy_on_the_same_weights():
    _, first, last, _ = learn(anchor="fixed")
    assert changed(first.params, last.anchor) == set()
    assert last.anchor["embed"] is last.params["embed"]


def test_micro_batches_and_checkpointed_gradients_change_no_update():
    whole, split = learn(anchor="fixed"), learn(anchor="fixed", micro=2, remat="save_dots")
    batches = [parts.laid_out(tiny.sequences()[0]).batch for parts, *_ in (whole, split)]
    assert batches[0].num_micro_B[0] == 1 < batches[1].num_micro_B[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        whole[2].params,
        split[2].params,
    )


def test_eight_devices_learn_like_one():
    _, _, expected, _ = learn(anchor="fixed")
    parts, _, state, _ = learn(mesh_sizes=(2, 2, 2), anchor="fixed")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        expected.params,
        state.params,
    )
    same = jax.tree.map(
        lambda x, s: x.dtype == s.dtype and x.sharding.is_equivalent_to(s.sharding, x.ndim),
        state,
        parts.abstract_state(),
    )
    assert all(jax.tree.leaves(same))
    assert "tensor" in str(state.params["layers"]["o_lora_a"].sharding.spec)
    assert state.frozen_checksum == expected.frozen_checksum


def test_an_adapter_of_an_unknown_weight_is_an_uncovered_parameter():
    _, params = adapted()
    layers = params["layers"] | {"router_lora_a": jnp.zeros((2, 16, 2))}
    with pytest.raises(ValueError, match=r"no logical axes .*router_lora_a \(2, 16, 2\)"):
        logical_axes({**params, "layers": layers})


def compiled_update(policy):
    """The memory of an update on shapes alone."""
    adamw = optimizer.make_optimizer(optax.constant_schedule(0.1), weight_decay=0.1, grad_clip=1.0)
    step = update.make_update(policy, losses.Adpo(), adamw, num_micro=2)
    batch, rewards = tiny.batch()
    scores = losses.Adpo().score(jnp.asarray(rewards))
    state = jax.eval_shape(lambda p: update.init_state(policy, p, adamw), policy.abstract_params())
    return step.lower(state, batch, scores, None).compile().memory_analysis()


def test_an_update_keeps_no_gradient_and_no_copy_of_the_base():
    config = {**tiny.CONFIG, "hidden_size": 64, "intermediate_size": 512, "vocab_size": 4096}
    full = Policy.abstract_from_config(config)
    adapted = dataclasses.replace(full, lora=Lora(2, 4.0))
    base = sum(x.size * 4 for x in jax.tree.leaves(full.abstract_params()))
    of_full, of_lora = compiled_update(full), compiled_update(adapted)
    # The gradient and the sum of micro-batches' gradients are gone.
    assert of_lora.temp_size_in_bytes < of_full.temp_size_in_bytes - 1.5 * base
    assert of_lora.argument_size_in_bytes < of_full.argument_size_in_bytes - 1.8 * base
    # What goes in comes out in the same buffers.
    assert of_lora.alias_size_in_bytes > 0.99 * of_lora.output_size_in_bytes > base


@pytest.mark.parametrize("kwargs", [{}, {"attention": "xla"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_samples_from_the_policy_that_is_trained(dtype, kwargs, monkeypatch):
    if kwargs:  # layers stacked, as on accelerators
        monkeypatch.setattr("adpo_jax.engine.tuning.MAX_UNROLLED_ON_CPU", 0)
    policy, params = adapted(dtype=dtype)
    engine = Engine(policy, max_prompt_length=6, max_response_length=8, num_slots=4, **kwargs)
    loaded = engine.verbs.load_params(params)
    assert isinstance(loaded["layers"], dict) == bool(kwargs)
    if kwargs:  # stacked: no copy of the base
        assert all(x is params["layers"][name] for name, x in loaded["layers"].items())
    prompts = [[3, 4, 5], [7, 8, 9, 10]]
    out = engine.generate(params, prompts, SamplingParams(n=2, max_tokens=8), jax.random.key(0))
    error = []
    for prompt, tokens, log_probs in zip(prompts, out.padded("tokens"), out.padded("log_probs")):
        rows = np.concatenate([np.tile(prompt, (2, 1)), tokens], axis=1)
        scored = np.asarray(policy.log_probs(params, rows))[:, len(prompt) :]
        error.append(np.abs(scored - log_probs).max())
    assert max(error) < (1e-5 if dtype == "float32" else 0.1)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match=r"adapts some of q_proj, .*; given q_proj, lm_head"):
        Lora(2, 4.0, lora.parse_targets("q_proj,lm_head"))
    with pytest.raises(ValueError, match="rank of LoRA is at least 1, given 0"):
        Lora(0, 4.0)
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha of LoRA is above 0 and finite, given {alpha}"):
            Lora(2, alpha)
    assert lora.parse_targets("all-linear") == tuple(adaptable())
    # Layers of two shapes, and those with gates, have weights of their own under the same name.
    found = lora.parse_targets("q_proj, v_proj")
    assert found == ("q", "global_q", "gated_q", "v", "global_v")
