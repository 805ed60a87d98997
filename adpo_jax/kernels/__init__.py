"""Attention of the rollout engine: which implementation runs where.

Those of decoding take the same arguments as `kv_cache.attend_part`, the plain version that all are
tested on; the plain version of prefill is `Policy.self_attention`.
"""

import functools

import jax
import jax.numpy as jnp

from adpo_jax import kv_cache
from adpo_jax.attention import Attend
from adpo_jax.kernels import decode_gpu, decode_tpu, prefill_tpu
from adpo_jax.kv_cache import AttendPart, CacheLayout
from adpo_jax.policy import Policy

# xla: everywhere. pallas_tpu: Mosaic; its _interpret runs on a CPU, to test. pallas_gpu: Triton.
ATTENTION = ("auto", "xla", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret")


def resolve(attention: str, layout: CacheLayout, num_devices: int) -> str:
    """The implementation that `auto` means here; a chosen one is checked.

    On GPUs `auto` is xla: the Triton kernel compiles, but no measurement speaks for it yet. Kernels
    know nothing of meshes, so on several devices it is xla too.

    Raises:
      ValueError: for a name that is none of `ATTENTION`, or a kernel that cannot run with these
        sizes.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention is one of {', '.join(ATTENTION)}; given {attention!r}")
    fits_tpu = layout.stacked and layout.head_dim % 128 == 0 and num_devices == 1
    if attention == "auto":
        on_tpu = jax.default_backend() == "tpu"
        return "pallas_tpu" if on_tpu and fits_tpu else "xla"
    if attention != "xla" and num_devices > 1:
        raise ValueError(f"attention {attention!r} runs on one device; use xla on {num_devices}")
    if attention.startswith("pallas_tpu") and not fits_tpu:
        raise ValueError(
            f"attention {attention!r} needs a head_dim that is a multiple of 128; "
            f"given {layout.head_dim}. Use xla"
        )
    if attention == "pallas_gpu" and jnp.dtype(layout.dtype) == jnp.int8:
        raise ValueError("attention 'pallas_gpu' has no int8 cache; use bfloat16, or xla")
    return attention


def attend_part(attention: str, layout: CacheLayout, soft_cap: float | None) -> AttendPart:
    """The chosen implementation of `kv_cache.attend_part`."""
    if attention == "xla":
        return functools.partial(
            kv_cache.attend_part, soft_cap=soft_cap, transposed_keys=layout.transposed_keys
        )
    if attention == "pallas_gpu":
        return functools.partial(decode_gpu.attend_part, soft_cap=soft_cap)
    interpret = attention.endswith("interpret")
    return functools.partial(decode_tpu.attend_part, soft_cap=soft_cap, interpret=interpret)


def prefill_attention(
    attention: str, policy: Policy, positions: jax.Array, segments: jax.Array
) -> Attend:
    """Causal attention of prompts padded on the right to themselves.

    Args:
      positions, segments: [rows, T] int32, as `Policy.self_attention` takes them.
    """
    length = positions.shape[1]
    if attention.startswith("pallas_tpu") and prefill_tpu.fits(policy.config, length):
        interpret = attention.endswith("interpret")
        return prefill_tpu.causal_attention(policy.config, length, interpret=interpret)
    return policy.self_attention(positions, segments)
