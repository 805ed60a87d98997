"""Attention of whole rows: each implementation against the plain one, gradients and meshes too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adpo_jax import Policy
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.model import attention_kernels
from adpo_jax.model.attention import LayerInfo, Places, visible
from adpo_jax.model.attention_kernels import Settings

H, K, D, T = 4, 2, 128, 100
SETTINGS = Settings((40, None), K, D, D**-0.5, 5.0, jnp.float32, None)


def test_a_token_sees_its_segment_and_its_prompt_up_to_itself_within_the_window():
    # A prompt of two tokens, a completion of two that counts on from it, another prompt, padding.
    tokens = Places(
        positions=np.array([0, 1, 2, 3, 0, 0]),
        segments=np.array([1, 1, 2, 2, 3, 0]),
        prompts=np.array([1, 1, 1, 1, 3, 0]),
    )
    everything = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(visible(*tokens.pairs()), everything)
    np.testing.assert_array_equal(
        visible(*tokens.pairs(), window=2), np.array(everything) - np.tril(everything, -2)
    )
    rows = tokens._replace(prompts=None)
    np.testing.assert_array_equal(visible(*rows.pairs())[3], [0, 0, 1, 1, 0, 0])


def rows(B):
    """Queries, keys, values, and two segments a row behind some padding."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, D)), jnp.float32) for n in (H, K, K))
    segments = np.ones((B, T), np.int32)
    segments[:, 60:] = 2
    segments[0, :13] = 0
    positions = np.where(segments == 2, np.arange(T) - 60, np.arange(T)).astype(np.int32)
    return q, k, v, jnp.asarray(positions), jnp.asarray(segments)


def layer(index: int) -> LayerInfo:
    window = SETTINGS.windows[index] or np.iinfo(np.int32).max
    return LayerInfo(jnp.int32(index), jnp.int32(window), jnp.int32(0))


def value_and_gradients(name, settings, index, B=2):
    q, k, v, positions, segments = rows(B)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=q.shape), jnp.float32)
    real = (segments > 0)[..., None, None]

    def loss(q, k, v):
        attend = attention_kernels.self_attention(name, settings, positions, segments)
        out = jnp.where(real, attend(q, k, v, layer(index), None)[0], 0)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("index", [0, 1])
def test_splash_and_its_gradients_agree_with_plain_attention_in_every_layers_window(index):
    plain = value_and_gradients("xla", SETTINGS, index)
    splash = value_and_gradients("pallas_tpu_interpret", SETTINGS, index)
    for ours, wanted in zip(splash, plain):
        np.testing.assert_allclose(ours, wanted, atol=5e-5)


@pytest.mark.parametrize("B", [4, 3])  # rows that the mesh does not divide run on every device
def test_splash_on_eight_devices_agrees_with_plain_attention(B):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    plain = value_and_gradients("xla", SETTINGS, 1, B=B)
    splash = value_and_gradients("pallas_tpu_interpret", SETTINGS._replace(mesh=mesh), 1, B=B)
    for ours, wanted in zip(splash, plain):
        np.testing.assert_allclose(ours, wanted, atol=5e-5)


def test_what_is_given_to_cudnn_masks_what_plain_attention_does(monkeypatch):
    plain_version = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return plain_version(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    settings = SETTINGS._replace(soft_cap=None)
    for index in (0, 1):
        plain = value_and_gradients("xla", settings, index)
        cudnn = value_and_gradients("cudnn", settings, index)
        for ours, wanted in zip(cudnn, plain):
            np.testing.assert_allclose(ours, wanted, atol=5e-5)


def test_cudnn_and_its_gradient_lower_for_cuda(monkeypatch):
    """JAX asks the GPU for its generation and for cuDNN's version: answered as on an H200."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    settings = SETTINGS._replace(soft_cap=None, dtype=jnp.bfloat16)

    def gradients(q, k, v, positions, segments):
        def loss(q, k, v):
            attend = attention_kernels.self_attention("cudnn", settings, positions, segments)
            return jnp.sum(attend(q, k, v, layer(0), None)[0].astype(jnp.float32))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    q, k, v, positions, segments = rows(B=2)
    arguments = (*(x.astype(jnp.bfloat16) for x in (q, k, v)), positions, segments)
    text = jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text


def test_log_probs_of_a_policy_do_not_depend_on_its_attention():
    config = tiny.model_config(head_dim=128, windows=(5, None))
    policy = Policy(config)
    params = policy.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 32, (2, 20)).astype(np.int32)
    mask = np.ones((2, 20), np.int32)
    mask[0, :6] = 0
    kernel = Policy(config, attention="pallas_tpu_interpret")
    np.testing.assert_allclose(
        kernel.log_probs(params, tokens, mask), policy.log_probs(params, tokens, mask), atol=2e-5
    )
