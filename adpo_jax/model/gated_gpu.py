"""Both gradients of a gated activation in one pass over its arguments: a GPU kernel in Triton.

XLA makes a kernel of each, and reads the incoming gradient and the gate twice. The forward pass and
the plain version of this one are `layers.gated`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model import layers
from adpo_jax.model.model_config import ACTIVATIONS
from adpo_jax.model.triton import plt

BLOCK, WARPS = 2048, 4
# The activations that Triton has the functions for.
LOWERED = ("silu", "gelu_tanh")


def runs(activation, dtype, size: int) -> bool:
    """Whether there is a kernel for this activation, dtype and number of gates under this jax."""
    fits = jnp.dtype(dtype).itemsize == 2 and size < 1 << 31
    return plt is not None and activation in LOWERED and fits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def gated(activation: str, gate: jax.Array, up: jax.Array, interpret: bool = False) -> jax.Array:
    """As `layers.gated`; gate and up have one shape, of any rank, and a dtype of 16 bits."""
    return layers.gated(activation, gate, up)


def _forward(activation, gate, up, interpret):
    return gated(activation, gate, up, interpret), (gate, up)


def _backward(activation, interpret, residuals, g):
    gate, up = residuals
    whole = pl.BlockSpec(memory_space=pl.ANY)
    flat = jax.ShapeDtypeStruct((gate.size,), gate.dtype)
    gradients = pl.pallas_call(
        functools.partial(_kernel, activation, gate.size),
        grid=(pl.cdiv(gate.size, BLOCK),),
        in_specs=[whole] * 3,
        out_specs=[whole] * 2,
        out_shape=[flat] * 2,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="gated_gradient",
    )(*(x.reshape(-1) for x in (gate, up, g)))
    return tuple(x.reshape(gate.shape) for x in gradients)


gated.defvjp(_forward, _backward)


def _kernel(activation: str, size: int, gate_ref, up_ref, g_ref, d_gate_ref, d_up_ref):
    first = pl.program_id(0) * BLOCK
    part, inside = pl.ds(first, BLOCK), first + jnp.arange(BLOCK) < size
    gate, up, g = (
        plt.load(ref.at[part], mask=inside, other=0.0).astype(jnp.float32)
        for ref in (gate_ref, up_ref, g_ref)
    )
    activated, slope = jax.vjp(ACTIVATIONS[activation], gate)
    for ref, x in ((d_gate_ref, slope(g * up)[0]), (d_up_ref, g * activated)):
        plt.store(ref.at[part], x.astype(ref.dtype), mask=inside)
