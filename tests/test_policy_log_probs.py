"""The chunked head: log-probs and entropies without [B, T, V] logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import model

from adpo_jax.log_probs import token_log_probs
from adpo_jax.model import head_logits

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


def test_no_array_holds_all_logits():
    config, head, hidden, targets, _ = inputs("qwen2")
    lowered = jax.jit(
        lambda head, hidden: token_log_probs(config, head, hidden, targets, tokens_per_chunk=4 * B)
    ).lower(head, hidden)
    text = lowered.as_text()
    V = config.vocab_size
    assert f"tensor<{B}x4x{V}xf32>" in text
    assert f"tensor<{B}x{T}x{V}xf32>" not in text
    assert f"tensor<{B}x12x{V}xf32>" not in text
