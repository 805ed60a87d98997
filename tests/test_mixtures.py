"""Mixtures of experts: grouped products, routing, experts on several devices, adapters."""

import base64
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from golden_models import config_of
from parsing import parse
from test_serve import post, running

from adpo_jax import Engine, Policy, SamplingParams, losses
from adpo_jax.data import arithmetic
from adpo_jax.devices import flops, host_memory, sharding
from adpo_jax.dry_run.hlo import Program
from adpo_jax.model import grouped, grouped_gpu, lora, mixture, parameters
from adpo_jax.model.exchange import Exchange
from adpo_jax.model.layer_weights import LayerWeights
from adpo_jax.model.lora import Lora
from adpo_jax.model.mixture import MixtureFfn
from adpo_jax.model.model_config import Mixture
from adpo_jax.policy import adapters
from adpo_jax.records import GradedGroups, Prompts, Sequences
from adpo_jax.rewards import Scores
from adpo_jax.rollouts import recording
from adpo_jax.run import loading
from adpo_jax.serve import __main__ as serve
from adpo_jax.update import init_state, make_log_probs, make_update, packing
from adpo_jax.update.gradient import Load
from adpo_jax.update.learner import check_experts
from adpo_jax.update.step import _mixture_metrics

# --- grouped products

SIZES = [[0, 40, 3, 17], [60, 0, 0, 0], [0, 0, 0, 0], [15, 15, 15, 15]]


@pytest.mark.parametrize("form", ["blocks", "ragged_dot"])
def test_grouped_products_are_those_of_each_row_with_its_own_matrix(form):
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((64, 8), (4, 8, 6), (64, 6)))
    product = jax.jit(getattr(grouped, f"product_by_{form}"))
    outer = jax.jit(getattr(grouped, f"outer_by_{form}"))
    for sizes in SIZES:
        group = np.repeat(np.arange(4), sizes)
        n = len(group)
        wanted = np.zeros((64, 6), np.float32)
        wanted[:n] = np.einsum("sd,sdf->sf", x[:n], w[group])
        sizes = jnp.asarray(sizes, jnp.int32)
        np.testing.assert_allclose(product(x, w, sizes), wanted, atol=1e-5)
        sums = np.zeros_like(w)
        np.add.at(sums, group, np.einsum("sd,sf->sdf", x[:n], g[:n]))
        np.testing.assert_allclose(outer(x, g, sizes), sums, atol=1e-5)


@pytest.mark.parametrize("sizes", [[0, 90, 3, 47], [150, 0, 0, 0], [0, 0, 0, 0], [37, 38, 37, 38]])
def test_the_kernels_for_accelerators_give_what_the_blocks_give(sizes):
    rng = np.random.default_rng(0)
    shapes = (150, 96), (4, 96, 48), (150, 48)
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    x = x.at[sum(sizes) :].set(jnp.nan)  # rows that are in no group are not read
    sizes = jnp.asarray(sizes, jnp.int32)
    found = grouped.product_by_kernel(x, w, sizes, interpret=True)
    wanted = grouped.product_by_blocks(jnp.nan_to_num(x), w, sizes)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    wanted = grouped.outer_by_blocks(jnp.nan_to_num(x), g, sizes)
    for outer in (grouped_gpu.outer, grouped.outer_by_megablox):
        np.testing.assert_allclose(outer(x, g, sizes, interpret=True), wanted, atol=1e-4)


def test_rows_that_the_kernels_do_not_take_are_told():
    assert grouped_gpu.runs(jnp.bfloat16, 2048, 768)
    assert not grouped_gpu.runs(jnp.float32, 2048, 768)
    assert not grouped_gpu.runs(jnp.bfloat16, 2048, 24)


def test_a_block_loop_turns_for_the_experts_that_are_hit_alone():
    turns = []

    def body(carry, group, row, rows):
        jax.debug.callback(lambda group: turns.append(int(group)), group)
        return carry

    jax.jit(lambda sizes: grouped._each_block(body, 0, sizes, 8))(jnp.array([0, 3, 0, 9, 0]))
    jax.effects_barrier()
    assert sorted(turns) == [1, 3, 3]


# --- a layer against the loop over its experts


ROUTERS = {
    "softmax": Mixture(6, 3, 12, normalised=False, shared_size=8, shared_gate=True),
    "softmax_of_chosen": Mixture(6, 2, 12, router="softmax_of_chosen"),
    "sigmoid": Mixture(
        6, 2, 12, router="sigmoid", groups=3, chosen_groups=2, scale=2.5, shared_size=8
    ),
}


@functools.cache
def layer(router: str = "softmax", dtype=jnp.float32, mesh=None):
    """The parameters of one layer with a mixture, with a bias of the choice that matters."""
    config = tiny.model_config(mixture=ROUTERS[router])
    params = Policy(config).init(jax.random.key(0))["layers"]
    params = {name: p[0] for name, p in params.items()}
    if "experts_bias" in params:
        params["experts_bias"] = jnp.linspace(-0.3, 0.3, 6)
    return LayerWeights(params, config, dtype, mesh, 0.5)


def looped(weights: LayerWeights, x, present, forced=None):
    """The mixture written as a loop over dense experts: the plain version."""
    m, p = weights.config.mixture, weights.params
    logits = jnp.einsum("btd,de->bte", x, p["experts_router"])
    chosen = mixture.choose(m, logits, p.get("experts_bias"), forced)

    def mlp(gate, up, down):
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    out = jnp.zeros_like(x)
    for e in range(m.num_experts):
        share = jnp.sum(jnp.where(chosen.experts == e, chosen.weights, 0), -1)
        expert = (p[f"experts_{name}"][e] for name in ("gate", "up", "down"))
        out += jnp.where(present, share, 0)[..., None] * mlp(*expert)
    if m.shared_size:
        shared = mlp(*(p[f"shared_{name}"] for name in ("gate", "up", "down")))
        gate = jax.nn.sigmoid(x @ p["shared_router"]) if m.shared_gate else 1.0
        out += gate * shared
    return out


RNG = np.random.default_rng(1)
X = RNG.normal(size=(8, 5, 32)).astype(np.float32)
G = RNG.normal(size=X.shape).astype(np.float32)
PRESENT = RNG.random((8, 5)) < 0.8


def value_and_gradient(weights, ffn):
    def value(params, x):
        out = ffn(dataclasses.replace(weights, params=params), x)
        return jnp.sum(out * G), out

    (_, out), gradient = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(weights.params, X)
    return out, gradient


def assert_same(found, wanted):
    out, (params, x) = wanted
    np.testing.assert_allclose(found[0], out, atol=1e-5)
    np.testing.assert_allclose(found[1][1], x, atol=1e-5 * np.abs(x).max())
    for name, gradient in params.items():
        scale = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(found[1][0][name], gradient, atol=1e-5 * scale, err_msg=name)


@functools.cache
def looped_result(router):
    weights = layer(router)
    return value_and_gradient(weights, lambda w, x: looped(w, x, PRESENT))


def info():
    return tiny.model_config().layer_info._replace(index=0)


def mixed(w, x):
    return MixtureFfn(jnp.asarray(PRESENT))(w, x, info())[0]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_mixture_and_its_gradient_are_those_of_the_loop_over_its_experts(router):
    assert_same(value_and_gradient(layer(router), mixed), looped_result(router))


def test_the_bias_of_a_sigmoid_router_and_its_groups_decide_the_choice_and_no_weight():
    m = dataclasses.replace(ROUTERS["sigmoid"], normalised=False, scale=1.0)
    logits = jnp.array([[3.0, -9.0, 1.0, 1.0, 2.0, -9.0]])
    # The best pair of a group counts: groups 1 (1 + 1) and 2 or 0; the bias lifts the last expert.
    free = mixture.choose(m, logits, None, None)
    assert set(free.experts[0].tolist()) <= {0, 1, 2, 3}
    biased = mixture.choose(m, logits, jnp.array([-5.0, 0, 0, 0, 0, 1.5]), None)
    assert set(biased.experts[0].tolist()) == {4, 5}
    np.testing.assert_allclose(
        jnp.sort(biased.weights[0]), jnp.sort(jax.nn.sigmoid(logits[0, 4:])), rtol=1e-6
    )


def test_large_logits_of_sigmoids_are_told_apart():
    m = Mixture(4, 1, 12, router="sigmoid_of_inputs")
    logits = jnp.array([[17.5, 20.0, 3.0, 1.0]])
    assert jax.nn.sigmoid(logits)[0, 0] == jax.nn.sigmoid(logits)[0, 1]
    assert mixture.choose(m, logits, None, None).experts.tolist() == [[1]]


def test_forced_experts_are_taken_with_the_routers_own_weights():
    weights = layer("softmax")
    forced = RNG.permuted(np.tile(np.arange(6), (8, 5, 1)), axis=-1)[..., :3]
    forced[0] = -1
    ffn = MixtureFfn(jnp.asarray(PRESENT), jnp.asarray(forced[:, :, None]))
    out, extras = jax.jit(lambda x: ffn(weights, x, info()))(X)
    np.testing.assert_allclose(out, looped(weights, X, PRESENT, jnp.asarray(forced)), atol=1e-5)
    np.testing.assert_array_equal(extras[mixture.ROUTED][1:], forced[1:])
    counts = np.bincount(np.asarray(extras[mixture.ROUTED])[PRESENT].ravel(), minlength=6)
    np.testing.assert_array_equal(extras[mixture.LOAD], counts)
    assert float(extras[mixture.PROBABILITY].sum()) == pytest.approx(PRESENT.sum(), rel=1e-5)


def test_the_balance_loss_is_least_where_experts_get_equal_shares():
    even = jnp.full((2, 4), 5.0)
    assert float(mixture.balance_loss(2 * even, even, 20.0)) == pytest.approx(2.0)
    load, probability = jnp.array([[40.0, 0, 0, 0]]), jnp.array([[20.0, 0, 0, 0]])
    assert float(mixture.balance_loss(load, probability, 20.0)) == pytest.approx(8.0)


# --- several devices


MESHES = {
    "fsdp and tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "experts alone": {"fsdp": 1, "expert": 2, "data": 4},
    "all": {"fsdp": 2, "expert": 2, "tensor": 2},
}


@pytest.mark.parametrize("name", MESHES)
def test_experts_on_eight_devices_give_the_output_and_gradient_of_one(name):
    mesh = sharding.make_mesh(**MESHES[name])
    plain = layer()
    params = {
        name: jax.device_put(
            p,
            sharding.named_sharding(mesh, parameters.at(("layers", name)).logical_axes, p.shape),
        )
        for name, p in plain.params.items()
    }
    weights = dataclasses.replace(plain, params=params, mesh=mesh)
    assert_same(value_and_gradient(weights, mixed), looped_result("softmax"))


def test_tokens_that_all_want_one_expert_find_weights_where_they_find_no_place():
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    forced = jnp.broadcast_to(jnp.array([1, 2, 0]), (8, 5, 1, 3))
    present = jnp.ones((8, 5), bool)

    def one_sided(w, x):
        return MixtureFfn(present, forced)(w, x, info())[0]

    ids = jnp.repeat(jnp.array([0, 1, 2]), 10)
    found = Exchange.of(jnp.bincount(ids, length=6), 30, 2)
    assert (found.places, int(found.parts_left(0)), int(found.parts_left(1))) == (24, 1, 0)
    weights = layer()
    wanted = value_and_gradient(weights, one_sided)
    assert_same(value_and_gradient(dataclasses.replace(weights, mesh=mesh), one_sided), wanted)


# The experts of a token, by its number.
CHOICES = {
    "even": lambda n: [n % 8, (n + 3) % 8],
    "one pair": lambda n: [0, 1],
    "two devices": lambda n: [n % 2, 2 + n % 3],
    "most on one": lambda n: [0, 1] if n % 4 else [n // 4 % 8, (n // 4 + 1) % 8],
}


def test_however_uneven_the_choice_no_device_multiplies_many_more_rows_than_another(monkeypatch):
    """Eight devices along `expert`, each with 256 rows and 40 places at each other one."""
    config = tiny.model_config(mixture=Mixture(8, 2, 12))
    params = {n: p[0] for n, p in Policy(config).init(jax.random.key(0))["layers"].items()}
    alone = LayerWeights(params, config, jnp.float32, None, 0.5)
    mesh = sharding.make_mesh(fsdp=1, expert=8)
    spread = dataclasses.replace(alone, mesh=mesh)
    x, g = np.random.default_rng(3).normal(size=(2, 8, 128, 32)).astype(np.float32)

    def value(params, x, forced, weights):
        weights = dataclasses.replace(weights, params=params)
        out = MixtureFfn(None, forced[:, :, None])(weights, x, info())[0]
        return jnp.sum(out * g), out

    def both(weights):
        grad = jax.value_and_grad(value, (0, 1), has_aux=True)
        return jax.jit(lambda p, x, forced: grad(p, x, forced, weights))

    rows, apply_rows = collections.Counter(), mixture._Experts.apply_rows

    def counted(self, params, likes, x, weights, sizes):
        device = jax.lax.axis_index("expert")
        jax.debug.callback(lambda d, n: rows.update({int(d): int(n)}), device, jnp.sum(sizes))
        return apply_rows(self, params, likes, x, weights, sizes)

    on_one, on_all = both(alone), both(spread)
    with monkeypatch.context() as patched:
        patched.setattr(mixture._Experts, "apply_rows", counted)
        counting = jax.jit(lambda p, x, forced: value(p, x, forced, spread)[1])
        for name, choice in CHOICES.items():
            forced = np.array([choice(n) for n in range(8 * 128)], np.int32).reshape(8, 128, 2)
            rows.clear()
            jax.block_until_ready(counting(params, x, forced))
            jax.effects_barrier()
            assert sum(rows.values()) == 8 * 256, name
            assert max(rows.values()) <= 2.25 * 256, (name, rows)
    for choice in (CHOICES["two devices"], CHOICES["most on one"]):
        forced = np.array([choice(n) for n in range(8 * 128)], np.int32).reshape(8, 128, 2)
        (_, out), gradient = on_one(params, x, forced)
        (_, found), other = on_all(params, x, forced)
        np.testing.assert_allclose(found, out, rtol=0, atol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
            scale = max(np.abs(theirs).max(), 1e-3)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


def test_the_balance_of_products_over_devices_leaves_those_of_experts_out():
    """They depend on what routers choose; a loop that no even choice enters counts for nothing."""
    mesh = sharding.make_mesh(fsdp=4, expert=2)
    policy, params = Policy.from_config(config_of("qwen3_moe"), jax.random.key(0), mesh=mesh)
    tokens, mask = np.ones((8, 16), np.int32), np.ones((8, 16), bool)
    loss = jax.jit(jax.grad(lambda params: policy.hidden(params, tokens, mask).sum()))
    traced = loss.trace(params)
    text = traced.lower().compile().as_text()
    program = Program(text, not_entered=(flops.OF_ROWS_LEFT,))
    assert flops.has_exchange(traced)
    asked = flops.traced_flops(traced, of_experts=False)
    assert asked < flops.traced_flops(traced)
    assert 8 * program.flops_without(flops.GROUPED_PRODUCTS) == asked
    assert program.flops_without(flops.GROUPED_PRODUCTS) < program.flops < Program(text).flops
    assert program.launches < Program(text).launches


def test_a_mesh_with_experts_is_refused_for_a_policy_without_but_not_beside_a_mixture():
    config, mesh = parse("--config.mesh.expert=2"), sharding.make_mesh(expert=2)
    with pytest.raises(ValueError, match=r"mesh.expert is 2, but the model has no experts"):
        loading.make_policy(config, loading.find_model(config), mesh)
    # A teacher's batch is split over the axis, as it is over fsdp.
    policy, params = tiny.policy_and_params()
    teacher = dataclasses.replace(policy, mesh=mesh)
    tokens = np.arange(32).reshape(8, 4)
    found = jax.jit(teacher.logits)(jax.device_put(params, teacher.shardings(params)), tokens)
    np.testing.assert_allclose(found, policy.logits(params, tokens), atol=1e-5)


def test_parameters_that_a_mesh_repeats_take_their_room_on_each_device(monkeypatch):
    policy = tiny.policy_and_params()[0]
    one_copy = sharding.device_bytes(policy.abstract_params())
    monkeypatch.setattr(host_memory, "room", lambda devices: 3 * one_copy)
    dataclasses.replace(policy, mesh=sharding.make_mesh(data=2, fsdp=4)).check_room()
    repeated = dataclasses.replace(policy, mesh=sharding.make_mesh(data=4, fsdp=2))
    with pytest.raises(ValueError, match=r"the parameters take .* GB, and the memory of 8 cpu"):
        repeated.check_room()


# --- adapters


def test_adapters_of_experts_act_as_merged_weights_and_travel_to_peft(tmp_path):
    policy, params = Policy.from_config(config_of("qwen2_moe"), jax.random.key(0))
    base = policy, params
    targets = lora.parse_targets("q_proj,gate_proj,up_proj,down_proj")
    assert {"gate", "experts_gate", "shared_gate"} <= set(targets)
    policy, params = policy.with_adapters(params, Lora(2, 6.0, targets), jax.random.key(1))
    assert "gate" not in policy.lora.targets
    trained, frozen = lora.split(params)
    assert trained["layers"]["experts_down_lora_a"].shape == (3, 5, 12, 2)
    trained = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape), trained
    )
    params = lora.join(trained, frozen)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9))

    policy.save_pretrained(tmp_path / "merged", params)
    plain, merged = Policy.from_pretrained(tmp_path / "merged")
    wanted = plain.logits(merged, tokens)
    np.testing.assert_allclose(policy.logits(params, tokens), wanted, atol=1e-4)
    assert np.abs(wanted - base[0].logits(base[1], tokens)).max() > 0.1

    adapters.save(tmp_path / "adapter", policy, params, base_model="some/model")
    found, loaded = adapters.load(*base, tmp_path / "adapter")
    assert set(found.lora.targets) == set(policy.lora.targets)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# --- learning


MOE = {
    **tiny.CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "num_hidden_layers": 3,
}


def test_the_trainer_on_the_samplers_experts_agrees_better_with_the_sampler(tmp_path):
    policy, params = Policy.from_config(MOE, jax.random.key(0), "bfloat16", "float32")
    params = jax.tree.map(lambda x: x * 2, params)
    engine = Engine(policy, max_prompt_length=4, max_response_length=24, num_slots=32)
    prompts = [[1 + p, 7, 3 + p][: 1 + p % 3] for p in range(8)]
    sampling = SamplingParams(n=4, max_tokens=24, routed_experts=True, prompt_experts=True)
    sampled = engine.generate(params, prompts, sampling, jax.random.key(1))
    c = sampled[3][1]
    assert c.experts.shape == (len(c), 3, 2)
    assert c.experts.dtype == np.uint8

    # What is recorded is what is read again.
    scores = Scores(np.zeros(32, np.float32), {}, {})
    recording.write(tmp_path, 1, GradedGroups(Prompts(prompts, {}), sampled, ["text"] * 32, scores))
    read = recording.read(tmp_path, 1).completions
    np.testing.assert_array_equal(read[3][1].experts, c.experts)
    for p, (ids, group) in enumerate(zip(prompts, sampled.groups)):
        assert group[0].prompt_experts.shape == (len(ids) - 1, 3, 2)
        for sample in range(4):
            np.testing.assert_array_equal(read[p][sample].prompt_experts, group[0].prompt_experts)

    def mismatch(groups) -> float:
        packed = packing.pack(Sequences(prompts, groups))
        scored, _ = make_log_probs(policy)(params, packed)
        ratio = np.asarray(packed.log_probs["sampler"] - scored)[packed.trained]
        return float(np.mean(np.expm1(-ratio) + ratio))

    plain = [[dataclasses.replace(c, experts=None) for c in group] for group in read.groups]
    assert mismatch(read.groups) < 0.8 * mismatch(plain)


def test_a_server_tells_the_experts_that_each_token_was_sampled_through(tmp_path):
    policy, params = Policy.from_config(
        MOE | {"vocab_size": 256, "max_position_embeddings": 128}, jax.random.key(0)
    )
    policy.save_pretrained(tmp_path / "moe", params, arithmetic.make_tokenizer())
    engine = Engine(policy, max_prompt_length=8, max_response_length=8, num_slots=2)
    sampling = SamplingParams(max_tokens=6, routed_experts=True, ignore_eos=True)
    (expected,) = engine.generate(params, [[9, 8, 7]], sampling, jax.random.key(5))[0]
    body = {"max_tokens": 6, "ignore_eos": True, "seed": 5, "routed_experts_prompt_start": 0}
    with running(tmp_path / "moe", "--enable-return-routed-experts") as (_, address):
        body = {"token_ids": [9, 8, 7], "sampling_params": body}
        answer = post(address, "/inference/v1/generate", json=body).json()
    (choice,) = answer["choices"]
    told = choice["routed_experts"]
    experts = np.frombuffer(base64.b64decode(told["data"]), told["dtype"]).reshape(told["shape"])
    assert choice["token_ids"] == expected.tokens.tolist()
    assert told["start"] == 2
    np.testing.assert_array_equal(experts, expected.experts)
    dense = tmp_path / "dense"
    policy, params = Policy.from_config(tiny.CONFIG | {"vocab_size": 256}, jax.random.key(0))
    policy.save_pretrained(dense, params, arithmetic.make_tokenizer())
    command = ["--model", str(dense), "--enable-return-routed-experts"]
    with pytest.raises(ValueError, match="experts of a mixture, and this model has none"):
        serve.make_server(serve.arguments(command))


def test_the_auxiliary_loss_evens_out_the_experts_and_replayed_ones_are_counted():
    policy, params = Policy.from_config(MOE, jax.random.key(0))
    sequences, rewards = tiny.sequences()
    rng = np.random.default_rng(0)
    experts = [[rng.integers(0, 8, (len(c), 3, 2)) for c in g] for g in sequences.completions]
    sequences = dataclasses.replace(
        sequences,
        completions=[
            [dataclasses.replace(c, experts=e.astype(np.uint8)) for c, e in zip(*groups)]
            for groups in zip(sequences.completions, experts)
        ],
    )
    algorithm, sgd = losses.Grpo(), optax.sgd(0.3)
    step = make_update(policy, algorithm, sgd, router_aux_loss_coef=5.0)
    batch = packing.pack(sequences, completions_per_micro=16)
    state, balance = init_state(policy, params, sgd), []
    for _ in range(3):
        state, metrics = step(state, batch, algorithm.score(jnp.asarray(rewards)), None)
        balance.append(float(metrics["router/balance_loss"]))
    assert balance[0] > balance[1] > balance[2]  # forced experts may be evener than the router's
    # A quarter of the experts at random are those that the router would choose.
    assert 0.6 < metrics["router/replay_changed_frac"] < 0.9
    assert metrics["router/busiest"] > 1


def test_the_load_of_a_batch_is_measured_by_hand_and_its_balance_is_a_mean_over_tokens():
    """Two layers of four experts, two experts a token."""
    extras = {
        mixture.LOAD: jnp.array([[3.0, 1.0, 0.0, 4.0], [2.0, 2.0, 3.0, 1.0]]),
        mixture.PROBABILITY: jnp.array([[1.0, 1.0, 0.5, 1.5], [0.5, 0.5, 2.0, 1.0]]),
    }
    load = Load.of(extras)
    metrics = _mixture_metrics(load, None)
    assert metrics["router/busiest"] == pytest.approx((4 / 2 + 3 / 2) / 2)
    assert metrics["router/idle_frac"] == pytest.approx(1 / 8)
    of_layers = [4 * (3 + 1 + 0 + 6) / 16, 4 * (1 + 1 + 6 + 1) / 16]
    assert metrics["router/balance_loss"] == pytest.approx(np.mean(of_layers))
    # It has four of the ten tokens of a batch.
    assert load.balance_loss(10.0) == pytest.approx(0.4 * np.mean(of_layers))
    # The loss of two micro-batches is the mean of theirs, and not that of their summed load.
    other = Load.of({name: x[:, ::-1] * 2 for name, x in extras.items()})
    metrics = _mixture_metrics(jax.tree.map(jnp.add, load, other), None)
    assert metrics["router/balance_loss"] == pytest.approx(np.mean(of_layers))


def test_experts_of_another_model_are_refused():
    policy = Policy.abstract_from_config(MOE)
    sequences, _ = tiny.sequences()
    experts = np.zeros((1, 2, 2), np.uint8)
    wrong = [[dataclasses.replace(c, experts=experts)] for c, *_ in sequences.completions]
    with pytest.raises(
        ValueError, match=r"not those of this model; wanted .*\(3, 2\), given \(2, 2\)"
    ):
        check_experts(policy.config, Sequences(sequences.prompts, wrong))
