"""Attention of the rollout engine: which implementation runs where.

Those of decoding take the same arguments as `kv_cache.attend_part`, the plain version that all are
tested on; prefill is attention of whole sequences (`attention_kernels`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adpo_jax import attention_kernels, kv_cache
from adpo_jax.attention import Attend
from adpo_jax.kernels import decode_gpu, decode_tpu
from adpo_jax.kv_cache import AttendPart, CacheLayout, Part, Reach
from adpo_jax.policy import Policy
from adpo_jax.sharding import RULES

# xla: everywhere. pallas_tpu: Mosaic; its _interpret runs on a CPU, to test. pallas_gpu: Triton,
# and cudnn for prefill where it takes the model.
ATTENTION = ("auto", "xla", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret")


def resolve(attention: str, layout: CacheLayout, platform: str) -> str:
    """The implementation that `auto` means here; a chosen one is checked.

    On GPUs `auto` is xla: the Triton kernel compiles, but no measurement speaks for it yet.

    Raises:
      ValueError: for a name that is none of `ATTENTION`, or a kernel that cannot run on this
        platform or with these sizes.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention is one of {', '.join(ATTENTION)}; given {attention!r}")
    fits_tpu = layout.stacked and layout.head_dim % 128 == 0
    if attention == "auto":
        return "pallas_tpu" if platform == "tpu" and fits_tpu else "xla"
    wanted = attention.removeprefix("pallas_")
    if wanted in ("tpu", "gpu") and platform != wanted:
        raise ValueError(
            f"attention {attention!r} runs on a {wanted.upper()}, and this is a {platform}; use "
            "auto, or xla"
        )
    if attention.startswith("pallas_tpu") and not fits_tpu:
        raise ValueError(
            f"attention {attention!r} needs a head_dim that is a multiple of 128; "
            f"given {layout.head_dim}. Use xla"
        )
    if attention == "pallas_gpu" and jnp.dtype(layout.dtype) == jnp.int8:
        raise ValueError("attention 'pallas_gpu' has no int8 cache; use bfloat16, or xla")
    return attention


def attend_part(
    attention: str, layout: CacheLayout, soft_cap: float | None, mesh: Mesh | None = None
) -> AttendPart:
    """The chosen implementation of `kv_cache.attend_part`; a kernel runs on each device's part."""
    if attention == "xla":
        return functools.partial(
            kv_cache.attend_part, soft_cap=soft_cap, transposed_keys=layout.transposed_keys
        )
    if attention == "pallas_gpu":
        kernel = functools.partial(decode_gpu.attend_part, soft_cap=soft_cap)
    else:
        interpret = attention.endswith("interpret")
        kernel = functools.partial(decode_tpu.attend_part, soft_cap=soft_cap, interpret=interpret)
    return kernel if mesh is None or mesh.size == 1 else _on_each_device(kernel, mesh)


def _on_each_device(kernel: AttendPart, mesh: Mesh) -> AttendPart:
    """A kernel on rows and heads that are split over the mesh; none needs those of another."""

    def attend(q, kv, index, reach: Reach) -> Part:
        rows, heads = RULES["batch"], attention_kernels.heads_axis(mesh, q.shape[1])
        lead = (None,) if kv.k.ndim == 5 else ()
        per_layer = PartitionSpec(*lead, rows, heads)
        per_row = PartitionSpec(rows)

        def local(q, kv, index, origin, back, length):
            return kernel(q, kv, index, Reach(origin, back, length, reach.ring))

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                PartitionSpec(rows, heads),
                jax.tree.map(lambda _: per_layer, kv),
                PartitionSpec(),
                *(per_row,) * 3,
            ),
            out_specs=PartitionSpec(rows, heads),
            check_vma=False,
        )(q, kv, index, reach.origin, reach.reach, reach.length)

    return attend


def prefill_attention(
    attention: str, policy: Policy, positions: jax.Array, segments: jax.Array
) -> Attend:
    """Causal attention of prompts padded on the right to themselves.

    Args:
      positions, segments: [rows, T] int32, as `Policy.self_attention` takes them.
    """
    settings = policy.attention_settings
    prefill = "cudnn" if attention == "pallas_gpu" else attention
    if attention_kernels.obstacle(prefill, settings):
        prefill = "xla"
    return attention_kernels.self_attention(prefill, settings, positions, segments)
