"""Norm and rotation of queries or keys in one kernel for GPUs, in Triton, with gradients.

XLA makes three to five kernels of it, and float32 arrays between them: on an H200 a twelfth of an
update of Qwen3-0.6B. A program here reads some heads of some tokens once and writes them once. The
plain version is `rope.rotate(layers.rms_norm(x, weight), cos, sin)`.

Letters: B rows, T tokens, N = B T, H heads, D head dim, S tokens of a block, h heads of one.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.triton import plt

# Tokens and heads of a block, where they divide what there is.
BLOCK = (4, 8)
WARPS = 4
# Heads narrower than this fill no warp, and wider ones do not fit the registers.
LEAST_HEAD_DIM, MOST_HEAD_DIM = 32, 256


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static settings of the kernels, of which `eps` and `plus_one` are those of `rms_norm`."""

    eps: float
    plus_one: bool
    interpret: bool


def runs(dtype, head_dim: int) -> bool:
    """Whether there is a kernel for heads of this dtype and size under this jax."""
    is_power = head_dim & (head_dim - 1) == 0 and LEAST_HEAD_DIM <= head_dim <= MOST_HEAD_DIM
    return plt is not None and jnp.dtype(dtype).itemsize == 2 and is_power


def norm_and_rotate(
    x: jax.Array,
    weight: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float = 0.0,
    plus_one: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """The rotation of the norm of heads, in the dtype of x; cos and sin get no gradient.

    Args:
      x: [B, T, H, D].
      weight: [D] of the norm; None for a rotation alone.
      cos, sin: [B, T, D // 2] float32.
      eps, plus_one: as for `rms_norm`.
    """
    static = _Static(eps, plus_one, interpret)
    flat = (y.reshape(-1, *y.shape[2:]) for y in (x, cos, sin))
    return _turned(static, weight, *flat).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned(static: _Static, weight, x_NHD, cos, sin):
    return _forward(static, weight, x_NHD, cos, sin)[0]


def _forward(static: _Static, weight, x_NHD, cos, sin):
    inputs = [x_NHD, cos, sin] + ([] if weight is None else [weight])
    (out,) = _call(static, _forward_kernel, x_NHD, inputs, [], "norm_rope")
    return out, (weight, x_NHD, cos, sin)


def _backward(static: _Static, residuals, g_NHD):
    weight, x_NHD, cos, sin = residuals
    inputs = [x_NHD, cos, sin, g_NHD] + ([] if weight is None else [weight])
    parts = [] if weight is None else [weight.shape[0]]
    d_x, *d_parts = _call(static, _backward_kernel, x_NHD, inputs, parts, "norm_rope_gradient")
    if weight is None:
        return None, d_x, None, None
    return jnp.sum(d_parts[0], axis=(0, 1)).astype(weight.dtype), d_x, None, None


_turned.defvjp(_forward, _backward)


def _call(static: _Static, kernel, x_NHD, inputs, parts: list[int], name: str):
    """Runs a kernel over blocks of x; `parts` are the lengths of what each block sums."""
    (N, H, _), whole = x_NHD.shape, pl.BlockSpec(memory_space=pl.ANY)
    S, h = math.gcd(N, BLOCK[0]), math.gcd(H, BLOCK[1])
    grid = (N // S, H // h)
    out_shape = [jax.ShapeDtypeStruct(x_NHD.shape, x_NHD.dtype)]
    out_shape += [jax.ShapeDtypeStruct((*grid, size), jnp.float32) for size in parts]
    return pl.pallas_call(
        functools.partial(kernel, static, S, h),
        grid=grid,
        in_specs=[whole] * len(inputs),
        out_specs=[whole] * len(out_shape),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=static.interpret,
        name=name,
    )(*inputs)


class _Block:
    """A program's block: S tokens times h heads, in two halves of their dimensions."""

    def __init__(self, S: int, h: int, D: int):
        self.i, self.j = pl.program_id(0), pl.program_id(1)
        self.tokens, self.heads = pl.ds(self.i * S, S), pl.ds(self.j * h, h)
        self.halves = [pl.ds(0, D // 2), pl.ds(D // 2, D // 2)]

    def load(self, ref):
        """The halves [S, h, D // 2] of an array [N, H, D], in float32."""
        return [plt.load(ref.at[self.tokens, self.heads, half]).astype(jnp.float32)
                for half in self.halves]  # fmt: skip

    def store(self, ref, pair):
        for half, x in zip(self.halves, pair):
            plt.store(ref.at[self.tokens, self.heads, half], x.astype(ref.dtype))

    def table(self, ref):
        """The rows [S, 1, D // 2] of cos or sin."""
        return plt.load(ref.at[self.tokens, slice(None)])[:, None, :]

    def scale(self, static: _Static, ref):
        """The halves [1, 1, D // 2] of what the norm multiplies by."""
        more = 1.0 if static.plus_one else 0.0
        each = (plt.load(ref.at[half]).astype(jnp.float32) + more for half in self.halves)
        return [x[None, None, :] for x in each]


def _mean(pair):
    """The mean [S, h, 1] over both halves."""
    first, second = (jnp.sum(x, axis=-1, keepdims=True) for x in pair)
    return (first + second) / (2 * pair[0].shape[-1])


def _inverse_rms(static: _Static, x):
    return jax.lax.rsqrt(_mean([half * half for half in x]) + static.eps)


def _forward_kernel(static: _Static, S, h, x_ref, cos_ref, sin_ref, *refs):
    *weight, out = refs
    block = _Block(S, h, x_ref.shape[-1])
    x, cos, sin = block.load(x_ref), block.table(cos_ref), block.table(sin_ref)
    if weight:
        inverse, scale = _inverse_rms(static, x), block.scale(static, weight[0])
        # The norm's result has the dtype of x, as in the plain version.
        normed = ((half * inverse * w).astype(x_ref.dtype) for half, w in zip(x, scale))
        x = [half.astype(jnp.float32) for half in normed]
    block.store(out, [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin])


def _backward_kernel(static: _Static, S, h, x_ref, cos_ref, sin_ref, g_ref, *refs):
    """Turns the gradient back, then as `layers._rms_norm_backward`."""
    block = _Block(S, h, x_ref.shape[-1])
    g, cos, sin = block.load(g_ref), block.table(cos_ref), block.table(sin_ref)
    g = [g[0] * cos + g[1] * sin, g[1] * cos - g[0] * sin]
    if len(refs) == 1:
        block.store(refs[0], g)
        return
    weight, d_x, d_weight = refs
    g = [half.astype(g_ref.dtype).astype(jnp.float32) for half in g]
    x, scale = block.load(x_ref), block.scale(static, weight)
    inverse = _inverse_rms(static, x)
    mean = _mean([a * b * w for a, b, w in zip(x, g, scale)])
    pull = inverse * inverse * mean
    block.store(d_x, [inverse * (w * b - a * pull) for a, b, w in zip(x, g, scale)])
    for half, a, b in zip(block.halves, x, g):
        total = jnp.sum(jnp.sum(a * b * inverse, axis=0), axis=0)
        plt.store(d_weight.at[block.i, block.j, half], total)
