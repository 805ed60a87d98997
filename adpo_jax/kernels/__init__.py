"""Attention of the rollout engine: which implementation runs where.

Those of decoding take the same arguments as `kv_cache.attend_part`, the plain version that all are
tested on; the plain version of prefill is `Policy.self_attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adpo_jax import kv_cache
from adpo_jax.attention import Attend
from adpo_jax.kernels import decode_gpu, decode_tpu, prefill_tpu
from adpo_jax.kv_cache import AttendPart, CacheLayout, Part, Reach
from adpo_jax.policy import Policy
from adpo_jax.sharding import RULES, mesh_axis_size

# xla: everywhere. pallas_tpu: Mosaic; its _interpret runs on a CPU, to test. pallas_gpu: Triton.
ATTENTION = ("auto", "xla", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret")


def resolve(attention: str, layout: CacheLayout, platform: str) -> str:
    """The implementation that `auto` means here; a chosen one is checked.

    On GPUs `auto` is xla: the Triton kernel compiles, but no measurement speaks for it yet.

    Raises:
      ValueError: for a name that is none of `ATTENTION`, or a kernel that cannot run with these
        sizes.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention is one of {', '.join(ATTENTION)}; given {attention!r}")
    fits_tpu = layout.stacked and layout.head_dim % 128 == 0
    if attention == "auto":
        return "pallas_tpu" if platform == "tpu" and fits_tpu else "xla"
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
        rows, heads = RULES["batch"], heads_axis(mesh, q.shape[1])
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


def heads_axis(mesh: Mesh, num_kv_heads: int) -> str | None:
    """The mesh axis that key/value heads, and the queries that read them, are split over."""
    axis = RULES["kv_heads"]
    return axis if num_kv_heads % mesh_axis_size(mesh, axis) == 0 else None


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
        attend = prefill_tpu.causal_attention(policy.config, length, interpret=interpret)
        mesh = policy.mesh
        if mesh is None or mesh.size == 1:
            return attend
        heads = heads_axis(mesh, policy.config.num_kv_heads)
        spec = PartitionSpec(RULES["batch"], None, heads)

        def on_each_device(q, k, v, layer, cache):
            out = jax.shard_map(
                lambda q, k, v, layer: attend(q, k, v, layer, None)[0],
                mesh=mesh,
                in_specs=(spec, spec, spec, PartitionSpec()),
                out_specs=spec,
                check_vma=False,
            )(q, k, v, layer)
            return out, cache

        return on_each_device
    return policy.self_attention(positions, segments)
