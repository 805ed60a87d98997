"""The table of parameters: one row is enough, and seeds mean what they meant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from golden_models import FAMILIES, config_of
from safetensors.numpy import load_file

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.model import parameter_table, parameters, unstacked
from adpo_jax.model.decoder import decoder, gated_mlp
from adpo_jax.model.layer_weights import LayerWeights
from adpo_jax.model.lora import Lora
from adpo_jax.model.parameter_row import Parameter
from adpo_jax.policy import adapters
from adpo_jax.update import optimizer

TOKENS = np.random.default_rng(0).integers(0, 32, (3, 7)).astype(np.int32)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_parameters_are_those_of_the_table(name):
    policy = Policy.abstract_from_config(config_of(name))
    c = policy.config
    shapes = {path: x.shape for path, x in parameters.by_path(policy.abstract_params()).items()}
    assert shapes == {
        path: (len(row.layers_of(c)),) * (path[0] == "layers") + row.shape(c)
        for path, row in parameters.of_model(c).items()
    }


# How a row lies on disk, which decides whether peft has an adapter for it.
ON_DISK = ("when", "hf_name", "hf_axes", "alternates", "parted", "adapter_inputs", "turned_in_peft")


def test_rows_of_one_name_differ_in_their_tensor_alone():
    for rows in (parameter_table.TOP, parameter_table.LAYER):
        for row in rows:
            path = ("layers", row.name) if row in parameter_table.LAYER else (row.name,)
            first = parameters.at(path)
            same = {field: getattr(first, field) for field in ON_DISK}
            assert dataclasses.replace(row, **same) == first


def test_a_seed_gives_the_weights_that_it_gave_when_results_were_measured():
    params = Policy(tiny.model_config(qk_norm=True, qkv_bias=True)).init(jax.random.key(0))
    first = {
        "embed": [0.02284275, -0.4847238, -0.5057318],
        "q": [-0.06071637, -0.292279, 0.2201386],
        "down": [-0.440334, -0.3179002, -0.1878617],
    }
    found = {"embed": params["embed"], **params["layers"]}
    for name, wanted in first.items():
        np.testing.assert_allclose(found[name].ravel()[:3], wanted, rtol=1e-5)


# --- a parameter more is a row


def test_a_row_of_layers_that_there_are_not_is_no_row():
    with pytest.raises(AssertionError, match="layers='mixtures'"):
        Parameter("router", "DH", "mlp.router.weight", "H D", layers="mixtures")


ROUTER = Parameter("router", "DH", "mlp.router.weight", "H D", adapter_inputs=1)


def routed_mlp(weights: LayerWeights, x, layer):
    """A toy mixture, its experts multiples of one MLP; the extra says how uneven the shares are."""
    shares = jax.nn.softmax(weights.dense(x, "router"))
    out, _ = gated_mlp(weights, x, layer)
    scale = shares @ jnp.arange(1.0, shares.shape[-1] + 1)
    return out * scale[..., None], {"unevenness": jnp.mean(jnp.sum(jnp.square(shares), axis=-1))}


@pytest.fixture
def routed(monkeypatch):
    """A policy whose layers have a router, and its parameters."""
    monkeypatch.setattr(parameter_table, "LAYER", (*parameter_table.LAYER, ROUTER))
    return routed_model()


@functools.cache
def routed_model():
    # A size of its own: JAX would take an equal policy's program, which has no router.
    config = {**tiny.CONFIG, "intermediate_size": 40}
    return Policy.from_config(config, jax.random.key(0))


def test_a_row_is_drawn_laid_out_saved_decayed_and_decoded(routed, tmp_path):
    policy, params = routed
    assert params["layers"]["router"].shape == (2, 16, 4)
    axes = parameters.logical_axes(params)["layers"]["router"]
    assert axes == ("layers", "embed", "heads")

    policy.save_pretrained(tmp_path / "out", params)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.mlp.router.weight"].shape == (4, 16)
    _, loaded = Policy.from_pretrained(tmp_path / "out", mesh=make_mesh(1, 4, 2))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert "tensor" in str(loaded["layers"]["router"].sharding.spec)

    adamw = optimizer.make_optimizer(optax.constant_schedule(1.0), weight_decay=0.5, grad_clip=0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = adamw.update(zeros, adamw.init(params), params)
    assert np.any(updates["layers"]["router"])

    engine = Engine(policy, max_prompt_length=6, max_response_length=8, num_slots=4)
    assert "router" in engine.verbs.load_params(params)["layers"][0]
    engine.generate(params, [[3, 4]], SamplingParams(n=2, max_tokens=3), jax.random.key(0))


def test_an_adapter_sits_on_a_row_and_travels_to_peft(routed, tmp_path):
    policy, params = routed[0].with_adapters(
        routed[1], Lora(2, 4.0, ("router", "q")), jax.random.key(1)
    )
    assert params["layers"]["router_lora_a"].shape == (2, 16, 2)
    adapters.save(tmp_path / "adapter", policy, params, base_model="some/model")
    found, loaded = adapters.load(*routed, tmp_path / "adapter")
    assert found.lora.targets == ("q", "router")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# --- extras of an ffn


def uneven(policy, params, remat="none"):
    """The sum of what the layers' routers return, and the hidden states."""
    policy = dataclasses.replace(policy, gradient_checkpointing=remat)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    hidden, cache, extras = policy(params, TOKENS, positions, ffn=routed_mlp)
    assert cache is None
    assert extras["unevenness"].shape == (policy.config.num_layers,)
    return jnp.sum(extras["unevenness"]), hidden


@pytest.mark.parametrize("remat", ["none", "full", "save_dots"])
def test_extras_come_beside_hidden_states_with_their_gradient(routed, remat):
    policy, params = routed
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: uneven(policy, p, remat), has_aux=True))
    (value, _), gradient = value_and_grad(params)
    gradient = gradient["layers"]["router"]
    assert all(np.any(of_layer) for of_layer in gradient)
    # Along the gradient the loss rises as the gradient says.
    step = 1e-2 / np.linalg.norm(gradient)
    router = params["layers"]["router"] + step * gradient
    moved = {**params, "layers": {**params["layers"], "router": router}}
    (higher, _), _ = value_and_grad(moved)
    assert float(higher - value) == pytest.approx(1e-2 * np.linalg.norm(gradient), rel=0.1)


def test_extras_of_layers_one_by_one_are_those_of_the_scan(routed):
    policy, params = routed
    scanned = jax.jit(lambda p: uneven(policy, p))(params)
    one_by_one = unstacked.decoding_params(params, policy.config, lora_scale=None, join=True)
    unrolled = jax.jit(lambda p: uneven(policy, p))(one_by_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, unrolled)


def test_the_dense_mlp_has_no_extras():
    policy, params = tiny.policy_and_params()
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    attend = policy.self_attention(positions, jnp.ones_like(TOKENS))
    _, _, extras = decoder(policy.config, params, TOKENS, positions, attend=attend)
    assert extras == {}
