"""One iteration is the same on every mesh, and everything large is split over it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adpo_jax import losses
from adpo_jax.devices import sharding
from adpo_jax.dry_run.programs import traced_learning
from adpo_jax.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.model.embedding import embed_tokens
from adpo_jax.model.head import Once
from adpo_jax.model.parameters import logical_axes
from adpo_jax.policy import Policy
from adpo_jax.update import optimizer
from adpo_jax.update.anchor import Anchor
from adpo_jax.update.gradient import Gradient
from adpo_jax.update.learner import Learner
from adpo_jax.update.plan import BatchPlan

MESHES = [
    {"data": 8, "fsdp": 1},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 1, "sequence": 4},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
]
PROMPTS = [[1 + p, 7, 3 + p][: 1 + p % 3] for p in range(8)]


def make_learner(policy, opt=None):
    return Learner(
        policy=policy,
        algorithm=losses.Adpo(beta_anchor_kl=0.1),
        optimizer=opt or optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        anchor=Anchor("ema", ema_alpha=0.5),
        plan=BatchPlan(num_prompts=8, mini_prompts=8, micro_prompts=8, epochs=1),
    )


def make_engine(policy, mesh):
    return Engine(
        policy,
        mesh=mesh and sharding.rollout_mesh(mesh),
        max_prompt_length=4,
        max_response_length=6,
        num_slots=8,
        free_cache_engine=False,
    )


def iteration(mesh):
    """Greedy samples, the state after two updates and the metrics of each."""
    policy, params = tiny.policy_and_params(mesh)
    engine, learner = make_engine(policy, mesh), make_learner(policy)
    greedy = SamplingParams(n=1, temperature=0.0, max_tokens=6)
    out = engine.generate(params, PROMPTS, greedy, jax.random.key(0))
    state, history = learner.init_state(params), []
    for seed in range(2):  # in the second the policy has left its anchor
        batch, rewards = tiny.batch(seed=seed)
        state, metrics = learner.learn(state, batch.sequences(), rewards)
        by_machine = ("time/", "update/tokens_per_s", "update/padding_frac", "update/compiles")
        by_machine += ("update/load_imbalance",)
        history.append({k: v for k, v in metrics.items() if not k.startswith(by_machine)})
    return out.padded("tokens"), jax.device_get((state.params, state.anchor_params)), history


on_one_device = functools.cache(lambda: iteration(None))


@pytest.mark.parametrize("sizes", MESHES)
def test_an_iteration_on_eight_devices_equals_one_on_one_device(sizes):
    tokens, params, history = iteration(sharding.make_mesh(**sizes))
    expected_tokens, expected_params, expected_history = on_one_device()
    assert expected_history[1]["adpo/anchor_kl"] > 1e-3
    np.testing.assert_array_equal(tokens, expected_tokens)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        (params, history),
        (expected_params, expected_history),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("is_tied", "layout", "anchor"),
    [(True, "packed", "on_policy"), (False, "packed", "ema"), (True, "rows", "ema")],
)
def test_micro_batches_share_one_exchange_of_the_head(monkeypatch, is_tied, layout, anchor, dtype):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    config = tiny.CONFIG | {"tie_word_embeddings": is_tied}
    policy, params = Policy.from_config(
        config, jax.random.key(0), mesh=mesh, dtype=dtype, param_dtype="float32"
    )
    cut = {"micro_prompts": 4} if layout == "rows" else {"micro_completions": 2}
    plan = BatchPlan(8, 8, epochs=1, layout=layout, **({"micro_prompts": 8} | cut))
    learner = dataclasses.replace(make_learner(policy), plan=plan, anchor=Anchor(anchor))
    padded, rewards = tiny.batch()
    state = learner.init_state(params)
    settled, settle = [], Once.settle
    monkeypatch.setattr(Once, "settle", lambda *args: settled.append(1) or settle(*args))

    def learned():
        jax.clear_caches()
        state_now, metrics = learner.learn(
            jax.tree.map(jnp.copy, state), padded.sequences(), rewards
        )
        return jax.device_get(state_now.params), metrics["update/grad_norm"]

    once = learned()
    assert settled == [1]
    monkeypatch.setattr(Gradient, "_head_once", lambda *args: None)
    each = learned()
    assert settled == [1]
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, once, each)


def split_axes(x) -> set[str]:
    """The mesh axes that an array is split over."""
    names = [name if isinstance(name, tuple) else (name,) for name in x.sharding.spec]
    return {name for axes in names for name in axes if name}


def test_parameters_gradients_optimizer_anchor_cache_and_batches_are_split():
    mesh = sharding.make_mesh(1, 4, 2)
    policy, params = tiny.policy_and_params(mesh)
    adam = optimizer.make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.1, grad_clip=1.0)
    learner, engine = make_learner(policy, adam), make_engine(policy, mesh)
    state = learner.init_state(params)
    batch, _ = tiny.batch()
    tokens = learner.put(batch).tokens_PGS
    assert split_axes(tokens) == {"data", "fsdp"}
    assert tokens.addressable_shards[0].data.shape[0] == 2

    moments = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for tree in (params, moments.mu, moments.nu, state.anchor_params):
        for x in (tree["embed"], tree["layers"]["q"], tree["layers"]["o"], tree["layers"]["down"]):
            assert split_axes(x) == {"fsdp", "tensor"}
            assert x.addressable_shards[0].data.size == x.size // 8

    # Of an update on this mesh, no array is a whole gradient.
    (update, _) = traced_learning(learner, batch.sequences())["update"]
    compiled = update.lower().compile().as_text()
    for x in (params["embed"], params["layers"]["q"], params["layers"]["down"]):
        assert f"f32[{','.join(map(str, x.addressable_shards[0].data.shape))}]" in compiled
        assert f"f32[{','.join(map(str, x.shape))}]" not in compiled

    engine.generate(state.params, PROMPTS, SamplingParams(n=1, max_tokens=6), jax.random.key(0))
    for layer in (*engine._kept.ring, *engine._kept.prefix.kv):
        for x in (layer.k, layer.v):
            assert x.addressable_shards[0].data.size == x.size // 8


@pytest.mark.parametrize("sizes", MESHES)
def test_the_gradient_of_a_frequent_token_is_summed_in_the_dtype_of_the_table(sizes):
    mesh = sharding.make_mesh(**sizes)
    embed = jnp.zeros((32, 16), jnp.float32)
    tokens, config = np.zeros((8, 512), np.int32), tiny.policy_and_params()[0].config

    def value(embed):
        x = embed_tokens(config, embed, tokens, jnp.bfloat16, mesh)
        return jnp.sum(x.astype(jnp.float32)) * 0.01

    layout = sharding.named_sharding(mesh, ("vocab", "embed"), embed.shape)
    gradient = jax.jit(jax.grad(value))(jax.device_put(embed, layout))
    np.testing.assert_allclose(gradient[0], 4096 * float(jnp.bfloat16(0.01)), rtol=1e-3)


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def test_a_parameter_without_a_rule_is_an_error():
    wanted = r"no logical axes for .*: bias2 \(3,\), layers/router \(2, 3\)"
    with pytest.raises(ValueError, match=wanted):
        logical_axes({"layers": {"router": jnp.zeros((2, 3))}, "bias2": jnp.zeros(3)})


def test_a_process_samples_on_its_own_devices_with_whole_parameters():
    mesh = sharding.make_mesh(2, 2, 2)
    assert dict(sharding.rollout_mesh(mesh).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dict(sharding.rollout_mesh(mesh, 8).shape) == {"data": 1, "fsdp": 1, "tensor": 8}
    with pytest.raises(ValueError, match="is 3, which does not divide the 8 device"):
        sharding.rollout_mesh(mesh, 3)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("vocab", [32, 33])
def test_a_split_embedding_table_gives_the_rows_and_gradient_of_a_whole_one(sizes, vocab):
    mesh = sharding.make_mesh(**sizes)
    rng = np.random.default_rng(0)
    embed = jnp.asarray(rng.normal(size=(vocab, 16)), jnp.float32)
    tokens = rng.integers(0, vocab, (8, 3)).astype(np.int32)
    weights = rng.normal(size=(8, 3, 16)).astype(np.float32)
    config = tiny.policy_and_params()[0].config

    def value(embed, mesh):
        x = embed_tokens(config, embed, tokens, jnp.float32, mesh)
        return jnp.sum(x * weights), x

    layout = sharding.named_sharding(mesh, ("vocab", "embed"), embed.shape)
    (_, x), gradient = jax.jit(
        jax.value_and_grad(lambda e: value(e, mesh), has_aux=True), out_shardings=None
    )(jax.device_put(embed, layout))
    (_, wanted), wanted_gradient = jax.value_and_grad(lambda e: value(e, None), has_aux=True)(embed)
    np.testing.assert_array_equal(x, wanted)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-6)


def test_a_number_of_slices_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="dcn_data is 0, 1 or the number of slices, 1 here; giv"):
        sharding.make_mesh(dcn_data=2)
