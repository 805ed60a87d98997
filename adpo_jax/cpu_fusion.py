"""Where XLA's CPU compiler (jax 0.10) loses by fusing, and what keeps it from it.

Where arrays are multiplied and then summed, it hands both to a library that works through them one
number at a time. `made` first and then multiplied by a vector they are read at the speed of memory:
the gradient of a norm takes a tenth of the time, an update of a small model a sixth less.

What is used several times it may compute as often, cosines for every head of every layer, but never
a matrix product (`kept`).

Elsewhere the compiler sums while it multiplies, and nothing is made in between: there these are the
plain formulas.

Letters: D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def made(x: jax.Array) -> jax.Array:
    """x, on a CPU as an array of its own: what follows is not fused with what computes it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def kept(x: jax.Array) -> jax.Array:
    """x [..., D] float32, on a CPU computed once for all that use it; D is small."""

    def as_product(x):
        identity = np.eye(x.shape[-1], dtype=x.dtype)
        return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(x, cpu=as_product, default=lambda x: x)


def sum_of_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of all rows of x [..., D], each times its weight of [...]; [D] float32."""
    return jax.lax.platform_dependent(
        x, weights, cpu=_sum_of_rows_as_product, default=_plain_sum_of_rows
    )


def sum_of_columns(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of each row of x [..., D], its columns times their weights [D]; [...] float32."""
    return jax.lax.platform_dependent(
        x, weights, cpu=_sum_of_columns_as_product, default=_plain_sum_of_columns
    )


def _plain_sum_of_rows(x, weights):
    return jnp.sum(x * weights[..., None], axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)


def _plain_sum_of_columns(x, weights):
    return jnp.sum(x * weights, axis=-1, dtype=jnp.float32)


_float32_dot_general = functools.partial(
    jax.lax.dot_general,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
)


def _sum_of_rows_as_product(x, weights):
    rows = tuple(range(x.ndim - 1))  # not reshaped to one axis: a mesh may split several of them
    return _float32_dot_general(weights, x, dimension_numbers=((rows, rows), ((), ())))


def _sum_of_columns_as_product(x, weights):
    last = (x.ndim - 1,)
    return _float32_dot_general(x, weights, dimension_numbers=((last, (0,)), ((), ())))
