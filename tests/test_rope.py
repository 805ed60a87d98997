"""Rotary embeddings by hand numbers and by what they are for. (Golden logits cover the rest.)"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from adpo_jax.model.rope import Rope, cos_sin, rotate

HEAD_DIM = 8
# theta = 16: wavelengths of 2 pi times 1, 2, 4, 8 tokens.
PLAIN = np.array([1.0, 0.5, 0.25, 0.125])


def test_frequencies_are_a_geometric_series_from_one():
    frequencies, scale = Rope(theta=16.0).frequencies(HEAD_DIM)
    np.testing.assert_allclose(frequencies, PLAIN, rtol=1e-7)
    assert frequencies.dtype == np.float32
    assert scale == 1.0


def test_linear_divides_every_frequency():
    frequencies, scale = Rope(theta=16.0, kind="linear", factor=4.0).frequencies(HEAD_DIM)
    np.testing.assert_allclose(frequencies, PLAIN / 4, rtol=1e-7)
    assert scale == 1.0


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
    # Wavelengths 6.3, 12.6, 25.1, 50.3 of an original length of 32: turns 5.1, 2.5, 1.3, 0.6.
    rope = Rope(
        theta=16.0,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=32,
    )
    smooth = (np.array([2.5465, 1.2732]) - 1.0) / 3.0
    middle = PLAIN[1:3] * (smooth + (1 - smooth) / 8.0)
    wanted = [1.0, middle[0], middle[1], 0.125 / 8]
    np.testing.assert_allclose(rope.frequencies(HEAD_DIM)[0], wanted, rtol=1e-4)


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
    rope = Rope(
        theta=16.0,
        kind="yarn",
        factor=4.0,
        beta_fast=4.0,
        beta_slow=1.0,
        attention_factor=1.1,
        original_length=32,
    )
    # 4 turns over 32 tokens at dimension 8 ln(32 / 8 pi) / (2 ln 16) = 0.35, one turn at 2.35:
    # rounded outwards, the ramp goes from 0 to 3.
    ramp = np.array([0, 1, 2, 3]) / 3
    frequencies, scale = rope.frequencies(HEAD_DIM)
    np.testing.assert_allclose(frequencies, PLAIN * (1 - ramp) + PLAIN / 4 * ramp, rtol=1e-6)
    assert scale == 1.1


def test_yarn_may_keep_its_range_unrounded():
    rope = Rope(
        theta=16.0,
        kind="yarn",
        factor=4.0,
        beta_fast=4.0,
        beta_slow=1.0,
        truncate=False,
        original_length=32,
    )
    low = 4 * math.log(32 / (8 * math.pi)) / math.log(16)
    high = 4 * math.log(32 / (2 * math.pi)) / math.log(16)
    ramp = np.clip((np.arange(4) - low) / (high - low), 0, 1)
    wanted = PLAIN * (1 - ramp) + PLAIN / 4 * ramp
    np.testing.assert_allclose(rope.frequencies(HEAD_DIM)[0], wanted, rtol=1e-6)


def test_a_rotated_product_depends_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, HEAD_DIM)).astype(np.float32)
    positions = jnp.array([[3], [10], [40]])
    cos, sin = cos_sin((Rope(theta=100.0),), HEAD_DIM, jnp.concatenate([positions, positions + 5]))
    rows = [jnp.broadcast_to(x, (6, 1, 1, HEAD_DIM)) for x in (q, k)]
    rotated_q, rotated_k = (rotate(x, cos[0], sin[0]) for x in rows)
    products = jnp.einsum("bthd,bthd->b", rotated_q[3:], rotated_k[:3])
    np.testing.assert_allclose(products, np.full(3, products[0]), rtol=1e-5)
    assert not np.allclose(products[0], jnp.sum(q * k))
    np.testing.assert_allclose(
        jnp.linalg.norm(rotated_q, axis=-1), jnp.linalg.norm(rows[0], axis=-1), rtol=1e-6
    )


def test_each_rope_has_its_own_table():
    ropes = (Rope(theta=16.0), Rope(theta=16.0, kind="yarn", original_length=9, attention_factor=2))
    cos, sin = cos_sin(ropes, HEAD_DIM, jnp.zeros((2, 3), jnp.int32))
    assert cos.shape == sin.shape == (2, 2, 3, HEAD_DIM // 2)
    np.testing.assert_array_equal(cos[0], np.ones((2, 3, 4)))
    np.testing.assert_array_equal(cos[1], np.full((2, 3, 4), 2.0))


def test_rotation_keeps_bf16():
    cos, sin = cos_sin((Rope(),), HEAD_DIM, jnp.arange(4)[None])
    x = jnp.ones((1, 4, 2, HEAD_DIM), jnp.bfloat16)
    assert rotate(x, cos[0], sin[0]).dtype == jnp.bfloat16


def test_unknown_types_and_missing_lengths_are_refused():
    with pytest.raises(ValueError, match="'dynamic' is not supported; supported: default, linear"):
        Rope(kind="dynamic")
    with pytest.raises(ValueError, match="needs original_max_position_embeddings"):
        Rope(kind="llama3")
    with pytest.raises(ValueError, match=r"needs rope_theta as a number above 1; given 1\.0"):
        Rope(kind="yarn", original_length=8, theta=1.0)
