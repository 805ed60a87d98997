"""Gradients of a layer's functions against those that JAX derives of the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adpo_jax.model import cpu
from adpo_jax.model.layers import ACTIVATIONS, gated, project, rms_norm

EPS = 1e-6


def plain_rms_norm(x, weight, plus_one):
    x32 = x.astype(jnp.float32)
    normed = x32 / jnp.sqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPS)
    return (normed * (weight.astype(jnp.float32) + plus_one)).astype(x.dtype)


def pulled(function, cotangent, *arguments):
    """The value and the gradients of a function, jitted."""

    @jax.jit
    def both(cotangent, *arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(cotangent.astype(value.dtype))

    return both(cotangent, *arguments)


def drawn(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def agree(ours, plain, tolerance):
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 3, 4, 8), (1, 1, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_the_norm_and_its_gradients_are_those_of_the_formula(plus_one, shape, dtype, tolerance):
    x, g = drawn(shape, shape, dtype=dtype)
    (weight,) = drawn(shape[-1:])
    ours = pulled(lambda x, w: rms_norm(x, w, EPS, plus_one), g, x, weight)
    plain = pulled(lambda x, w: plain_rms_norm(x, w, plus_one), g, x, weight)
    agree(ours, plain, tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_activation_and_its_gradients_are_those_of_the_formula(activation):
    gate, up, g = drawn((2, 5, 8), (2, 5, 8), (2, 5, 8))
    ours = pulled(functools.partial(gated, activation), g, gate, up)
    plain = pulled(lambda gate, up: ACTIVATIONS[activation](gate) * up, g, gate, up)
    agree(ours, plain, 1e-6)


@pytest.mark.parametrize(("width", "out"), [(4, 12), (12, 4)])
def test_a_projection_and_its_gradients_are_those_of_the_product(width, out):
    x, weight, g = drawn((2, 5, width), (width, out), (2, 5, out))
    agree(pulled(project, g, x, weight), pulled(jnp.matmul, g, x, weight), 1e-6)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 5, 7)])
def test_sums_as_products_agree_with_sums(shape):
    x, rows, columns = drawn(shape, shape[:-1], shape[-1:])
    agree(cpu.sum_of_rows(x, rows), cpu._plain_sum_of_rows(x, rows), 1e-6)
    agree(cpu.sum_of_columns(x, columns), cpu._plain_sum_of_columns(x, columns), 1e-6)


def test_what_is_kept_is_the_same_to_the_bit():
    (x,) = drawn((3, 5, 16))
    np.testing.assert_array_equal(jax.jit(cpu.kept)(x), x)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_products_stand_in_on_a_cpu_alone(platform):
    x, rows, columns = drawn((4, 8), (4,), (8,))

    def sums(x, rows, columns):
        x = cpu.made(cpu.kept(x))
        return cpu.sum_of_rows(x, rows), cpu.sum_of_columns(x, columns)

    traced = jax.jit(sums).trace(x, rows, columns)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == (platform == "cpu")
    assert ("optimization_barrier" in text) == (platform == "cpu")
