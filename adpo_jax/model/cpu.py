"""Formulas that XLA's CPU compiler (jax 0.10) needs, and no other one.

The compiler hands a product of arrays that is then summed to a library that works through it one
number at a time. If the product is an array of its own first (`made`) and is then multiplied
by a vector, it is read at the speed of memory: the gradient of a norm takes a tenth of the time, an
update of a small model a sixth less. The compiler may also compute a value again for each of its
users, such as cosines for every head of every layer, but never a matrix product (`kept`). Other
compilers sum while they multiply and make no array in between, so there these are the plain
formulas.

Letters: T tokens of all rows, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def made(x: jax.Array) -> jax.Array:
    """x; on a CPU it becomes an array of its own, not fused with the operations after it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def kept(x: jax.Array) -> jax.Array:
    """x [..., D] float32; on a CPU it is computed once for all its users. D is small."""

    def as_product(x):
        identity = np.eye(x.shape[-1], dtype=x.dtype)
        return jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.platform_dependent(x, cpu=as_product, default=lambda x: x)


def sum_of_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum [D] float32 of all rows of x [..., D], each times its weight of [...]."""
    return jax.lax.platform_dependent(
        x, weights, cpu=_sum_of_rows_as_product, default=_plain_sum_of_rows
    )


def sum_of_columns(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The sums [...] float32 of the rows of x [..., D], each column times its weight of [D]."""
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
    rows = tuple(range(x.ndim - 1))  # they stay several axes, since a mesh may split several
    return _float32_dot_general(weights, x, dimension_numbers=((rows, rows), ((), ())))


def _sum_of_columns_as_product(x, weights):
    last = (x.ndim - 1,)
    return _float32_dot_general(x, weights, dimension_numbers=((last, (0,)), ((), ())))
