"""The chunked head: log-probs and entropies without [B, T, V] logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import model

from adpo_jax.devices import sharding
from adpo_jax.model.decoder import head_logits
from adpo_jax.model.head import token_log_probs, weighted_log_probs

B, T = 3, 11


def inputs(name: str):
    policy, params = model(name)
    head = {key: params[key] for key in ("embed", "head") if key in params}
    key_hidden, key_targets, key_weights = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(key_hidden, (B, T, policy.config.hidden_size))
    targets = jax.random.randint(key_targets, (B, T), 0, policy.config.vocab_size)
    return policy.config, head, hidden, targets, jax.random.normal(key_weights, (2, B, T))


def plain(config, head, hidden, targets, *, temperature):
    log_p = jax.nn.log_softmax(head_logits(config, head, hidden) / temperature)
    scored = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return scored, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


# An untied head, and a tied one with a soft cap; 4 does not divide T = 11.
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_chunks_of_any_size_equal_the_plain_log_softmax_with_gradients(name):
    config, head, hidden, targets, weights = inputs(name)

    def value_and_gradients(score):
        def loss(head, hidden):
            scored, entropy = score(config, head, hidden, targets, temperature=0.6)
            return jnp.sum(weights[0] * scored + weights[1] * entropy), (scored, entropy)

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        quick = {"xla_backend_optimization_level": 0}
        return jax.jit(gradient, compiler_options=quick)(head, hidden)

    wanted = value_and_gradients(plain)
    for columns in (1, 4, T, 100):
        score = functools.partial(token_log_probs, tokens_per_chunk=columns * B)
        chunked = value_and_gradients(score)
        (_, (scored, entropy)), gradients = chunked
        assert scored.shape == entropy.shape == (B, T)
        assert all(np.any(g) for g in jax.tree.leaves(gradients[1]))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4), chunked, wanted
        )


def test_weights_known_beforehand_give_the_same_gradient_in_one_pass():
    config, head, hidden, targets, (weights, _) = inputs("gemma2")

    def plain_sum(head, hidden):
        scored, _ = plain(config, head, hidden, targets, temperature=0.6)
        return jnp.sum(weights * scored)

    def in_one_pass(head, hidden):
        return weighted_log_probs(
            config, head, hidden, targets, weights, temperature=0.6, tokens_per_chunk=8
        )

    wanted = jax.value_and_grad(plain_sum, argnums=(0, 1))(head, hidden)
    gradient = jax.value_and_grad(in_one_pass, argnums=(0, 1), has_aux=True)
    (total, (scored, entropy)), gradients = jax.jit(gradient)(head, hidden)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, (total, gradients), wanted)
    jax.tree.map(close, (scored, entropy), plain(config, head, hidden, targets, temperature=0.6))


# 64 tokens of a vocabulary of 64: tied and soft-capped, and untied.
@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_a_split_vocabulary_gives_the_same_and_no_device_gathers_logits(name):
    config, head, *_ = inputs(name)
    hidden = jax.random.normal(jax.random.key(1), (4, 16, config.hidden_size))
    targets = jax.random.randint(jax.random.key(2), (4, 16), 0, config.vocab_size)
    mesh = sharding.make_mesh(2, 2, 2)

    def score(mesh, head, hidden):
        def loss(head, hidden):
            total, (scored, entropy) = weighted_log_probs(
                config, head, hidden, targets, jnp.cos(targets), mesh=mesh, tokens_per_chunk=16
            )
            again, spread = token_log_probs(config, head, hidden, targets, mesh=mesh)
            return total + jnp.sum(jnp.sin(again) + spread), (scored, entropy, again)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(head, hidden)

    axes = {"embed": ("vocab", "embed"), "head": ("embed", "vocab")}
    laid_out = {
        k: jax.device_put(v, sharding.named_sharding(mesh, axes[k], v.shape))
        for k, v in head.items()
    }
    rows = jax.device_put(
        hidden, sharding.named_sharding(mesh, ("batch", None, None), hidden.shape)
    )
    compiled = jax.jit(functools.partial(score, mesh)).lower(laid_out, rows).compile()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, compiled(laid_out, rows), score(None, head, hidden))
    logits = f",{config.vocab_size}]"
    gathers = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
    assert not [
        line for line in gathers if logits in line.split("all-gather(")[0] and "[16," in line
    ]


def test_no_array_holds_all_logits():
    config, head, hidden, targets, _ = inputs("qwen2")
    lowered = jax.jit(
        lambda head, hidden: token_log_probs(config, head, hidden, targets, tokens_per_chunk=4 * B)
    ).lower(head, hidden)
    text = lowered.as_text()
    V = config.vocab_size
    assert f"tensor<{4 * B}x{V}xf32>" in text
    assert f"{T}x{V}xf32>" not in text
    assert f"tensor<{B * 12}x{V}xf32>" not in text


def test_loss_and_gradient_take_an_eighth_of_the_memory_of_all_logits():
    N, V, D = 4096, 4096, 128
    config = dataclasses.replace(
        model("qwen2")[0].config, vocab_size=V, hidden_size=D, tie_embeddings=True
    )
    head = {"embed": jax.ShapeDtypeStruct((V, D), jnp.float32)}
    hidden = jax.ShapeDtypeStruct((1, N, D), jnp.float32)
    targets = jnp.zeros((1, N), jnp.int32)
    weights = jnp.ones((1, N), jnp.float32)

    def in_chunks(head, hidden):
        return weighted_log_probs(
            config, head, hidden, targets, weights, tokens_per_chunk=128, with_entropy=False
        )[0]

    def all_at_once(head, hidden):
        return jnp.sum(weights * plain(config, head, hidden, targets, temperature=1.0)[0])

    def peak(loss):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return gradient.lower(head, hidden).compile().memory_analysis().temp_size_in_bytes

    assert peak(in_chunks) <= peak(all_at_once) / 8
