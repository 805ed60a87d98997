"""The functions of a layer besides attention, with gradients that keep and move little memory.

Letters: T tokens of all rows, D width, F width of the output.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from adpo_jax.model.cpu import made, sum_of_columns, sum_of_rows
from adpo_jax.model.model_config import ACTIVATIONS, ClampedGate


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float, plus_one: bool) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32; the result has the dtype of x.

    The backward pass needs x and the weight alone.

    Args:
      x: [..., D].
      weight: [D].
      eps: added to the mean square.
      plus_one: whether to multiply by 1 + weight (Gemma).

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _inverse_rms(x32, eps) * _norm_scale(weight, plus_one)).astype(x.dtype)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """`rms_norm` of x without a weight."""
    x32 = x.astype(jnp.float32)
    return (x32 * _inverse_rms(x32, eps)).astype(x.dtype)


def _inverse_rms(x32, eps):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _norm_scale(weight, plus_one):
    return weight.astype(jnp.float32) + (1.0 if plus_one else 0.0)


def _rms_norm_backward(eps, plus_one, residuals, g):
    """With r = 1 / rms(x) and y = r x w: dw = sum of r x g over rows, dx = r (w g - x r^2 m), where
    m is the mean of x w g over a row."""
    x, weight = residuals
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    inverse, scale = _inverse_rms(x32, eps), _norm_scale(weight, plus_one)
    product = made(x32 * g32)
    d_weight = sum_of_rows(product, inverse[..., 0])
    mean = sum_of_columns(product, scale / x.shape[-1])[..., None]
    d_x = inverse * (scale * g32 - x32 * (jnp.square(inverse) * mean))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


rms_norm.defvjp(
    lambda x, weight, eps, plus_one: (rms_norm(x, weight, eps, plus_one), (x, weight)),
    _rms_norm_backward,
)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] times weight [D, F] in the dtype of x; the weight's gradient has its own dtype."""
    return checkpoint_name(_product(x, weight), "projection")


@jax.custom_vjp
def _product(x, weight):
    return x @ weight.astype(x.dtype)


def _product_backward(residuals, g):
    x, weight = residuals
    # g is made before it is transposed. Else XLA's CPU compiler computes the operations behind g (a
    # gated activation's gradient, say) column by column, a fifth of a small model's update.
    g = made(g)
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    # The narrower operand is the one that gets transposed.
    if flat_x.shape[1] <= flat_g.shape[1]:
        d_weight = jnp.einsum("td,tf->df", flat_x, flat_g, preferred_element_type=jnp.float32)
    else:
        d_weight = jnp.einsum("tf,td->fd", flat_g, flat_x, preferred_element_type=jnp.float32).T
    return g @ weight.astype(g.dtype).T, d_weight.astype(weight.dtype)


_product.defvjp(lambda x, weight: (_product(x, weight), (x, weight)), _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: str | ClampedGate, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up; the backward pass needs the two arguments alone."""
    if isinstance(activation, ClampedGate):
        return activation(gate, up)
    return ACTIVATIONS[activation](gate) * up


def _gated_backward(activation, residuals, g):
    gate, up = residuals
    if isinstance(activation, ClampedGate):
        return jax.vjp(activation, gate, up)[1](g)
    activated, slope = jax.vjp(ACTIVATIONS[activation], gate)
    return slope(g * up)[0], g * activated


gated.defvjp(
    lambda activation, gate, up: (gated(activation, gate, up), (gate, up)), _gated_backward
)
