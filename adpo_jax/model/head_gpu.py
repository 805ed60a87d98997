"""What the head needs of a chunk of logits, in one pass over them: a kernel for GPUs, in Triton.

XLA reads the logits once for their maxima and once more for the sums; they are the largest array of
an update. A program here reads one row, two blocks at a time, and keeps a maximum and sums for each
place of a block, which it joins at the end (Milakov and Gimelshein 2018, arXiv 1805.02867). The
plain version is in `head.Head.scores`.

Letters: C tokens, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.triton import plt

BLOCK, WARPS = 4096, 8
# Below any logit, and finite, so that no difference of two is NaN.
_LOWEST = -1e30


def runs() -> bool:
    """Whether there is a kernel under this jax."""
    return plt is not None


def log_z_and_mean(logits_CV: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The log of the partition function of each row, and the mean logit under its softmax.

    Args:
      logits_CV: float32, finite.

    Returns:
      (log_z, mean), each [C] float32.
    """
    C, V = logits_CV.shape
    block = min(BLOCK, 1 << (V - 1).bit_length())
    whole = pl.BlockSpec(memory_space=pl.ANY)
    row_numbers = jax.ShapeDtypeStruct((C,), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, V, block),
        grid=(C,),
        in_specs=[whole],
        out_specs=[whole, whole],
        out_shape=[row_numbers, row_numbers],
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="head_sums",
    )(logits_CV)


def _kernel(V: int, block: int, logits, log_z, mean):
    row, place = pl.program_id(0), jnp.arange(block)

    def visit(i, sums):
        top, total, weighted = sums
        firsts = [(2 * i + j) * block for j in range(2)]
        inside = [first + place < V for first in firsts]
        each = [
            plt.load(logits.at[row, pl.ds(first, block)], mask=mask, other=_LOWEST)
            for first, mask in zip(firsts, inside)
        ]
        new_top = jnp.maximum(top, jnp.maximum(*each))
        shrink = jnp.exp(top - new_top)
        total, weighted = total * shrink, weighted * shrink
        for x, mask in zip(each, inside):
            exp = jnp.where(mask, jnp.exp(x - new_top), 0.0)
            total, weighted = total + exp, weighted + exp * x
        return new_top, total, weighted

    zeros = jnp.zeros(block, jnp.float32)
    first = jnp.full(block, _LOWEST, jnp.float32), zeros, zeros
    top, total, weighted = jax.lax.fori_loop(0, pl.cdiv(V, 2 * block), visit, first)
    highest = jnp.max(top, axis=0)
    share = jnp.exp(top - highest)
    total, weighted = jnp.sum(total * share, axis=0), jnp.sum(weighted * share, axis=0)
    plt.store(log_z.at[row], highest + jnp.log(total))
    plt.store(mean.at[row], weighted / total)
