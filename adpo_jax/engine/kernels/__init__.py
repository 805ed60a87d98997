"""Attention of the rollout engine: a table of implementations for decoding, and one for prefill.

The implementations of decoding take the same arguments as `group_attention.attend_part`, the plain
version that they are tested against. Prefill is attention of whole rows (`attention_kernels`).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.engine import group_attention, kv_cache
from adpo_jax.engine.group_attention import AttendPart, Part, Reach, View
from adpo_jax.engine.kernels import decode_gpu, decode_tpu, step_gpu
from adpo_jax.engine.kv_cache import KV, CacheLayout, LayerKV
from adpo_jax.model import attention_choice
from adpo_jax.model.attention import Attend, LayerInfo, Unturned
from adpo_jax.model.attention_choice import Implementation, Use
from adpo_jax.model.attention_kernels import ROWS
from adpo_jax.policy.policy import Policy

# (heads [B, 1, ...], ring and prefix of the layers of its kind, layer, view) -> attention
# [B, 1, H, D] and the ring with the keys and values; a ring's layers are a tuple.
AttendStep = Callable[[Unturned, KV, KV, LayerInfo, View], tuple[jax.Array, KV]]


def choose(name: str, layout: CacheLayout, device: jax.Device) -> str:
    """The name of the implementation that `name` means for decoding on a device.

    The choice is logged.

    Args:
      name: one of `attention_choice.NAMES`.
      device: one of the devices, which need not be there.

    Raises:
      ValueError: as `attention_choice.resolve` does.
    """
    chosen, why = name, ""
    if name == "auto" and device.platform == "gpu":
        why = decode_gpu.obstacle(device)
        chosen = attention_choice.PLAIN if why else name
    chosen = attention_choice.resolve(chosen, DECODING, layout, device.platform)
    reason = f": the kernel of GPUs {why}" if why else ""
    logging.info("attention of decoding on %s: %s%s", device.device_kind, chosen, reason)
    return chosen


def attend_part(
    name: str, layout: CacheLayout, soft_cap: float | None, mesh: Mesh | None = None
) -> AttendPart:
    """The attention of decoding; a kernel runs on each device's share of rows and heads.

    Args:
      name: as `attention_choice.resolve` gave it for `DECODING`.
    """
    return DECODING.table[name].attend(layout, soft_cap, mesh)


def attend_step(name: str, layout: CacheLayout, policy: Policy) -> AttendStep | None:
    """Norm, rotation, write and attention of a step in few kernels; None where there are none.

    They are for the 16 bits that a GPU samples in; float32 keeps the compiler's norm and rotation,
    to the bit those of prefill.

    Args:
      name: as `attention_choice.resolve` gave it for `DECODING`.
    """
    of_16_bits = jnp.dtype(policy.dtype).itemsize == 2
    if name != "pallas_gpu" or layout.stacked or not of_16_bits:
        return None
    return functools.partial(_step_on_gpu, policy)


def _step_on_gpu(
    policy: Policy, heads: Unturned, ring, prefix, layer: LayerInfo, view: View, *, interpret=False
):
    text = "decoding: norm, rotation and the write to the ring are parts of attention's two kernels"
    logging.log_first_n(logging.INFO, text, 1)
    c, mesh = policy.config, policy.mesh
    (B, _, H, D), K = heads.q.shape, heads.k.shape[2]
    reach = group_attention.ring_reach(
        view, kv_cache.num_columns(ring), 1, layer.window_at(view.position)
    )
    settings = step_gpu.Settings(
        c.attention_scale, c.attention_soft_cap, c.norm_eps, c.norm_plus_one, interpret
    )

    def local(by_head, by_row, shared):
        (q, k, v, ring, prefix), (cos, sin, *members, ring_reach, prefix_reach) = by_head, by_row
        *norms, column = shared
        flat = jnp.concatenate([x.reshape(len(x), -1) for x in (q, k, v)], axis=1)
        fed = step_gpu.Fed(flat.reshape(len(q), -1, D), *norms, cos, sin)
        return step_gpu.attend(
            settings,
            fed,
            ring,
            prefix,
            column,
            step_gpu.Members(*members),
            Reach(*ring_reach, ring=True),
            Reach(*prefix_reach, ring=False),
        )

    q_BKRD = heads.q.reshape(B, K, H // K, D)
    by_head = (q_BKRD, heads.k[:, 0], heads.v[:, 0], ring[layer.at], prefix[layer.at])
    members = (view.slot, view.row, view.rank)
    reaches = (reach[:3], group_attention.prefix_reach(view, layer, H // K, mesh)[:3])
    by_row = (heads.cos[:, 0], heads.sin[:, 0], *members, *reaches)
    axes = ("batch", "kv_heads")
    split = on_each_device(
        local,
        mesh,
        {"batch": math.gcd(B, len(view.slot)), "kv_heads": K},
        in_axes=(axes, axes[:1], ()),
        out_axes=axes,
    )
    out, changed = split(by_head, by_row, (heads.q_norm, heads.k_norm, view.column))
    return out.reshape(B, 1, H, D), kv_cache.with_layer(ring, layer.at, changed)


def prefill_attention(
    name: str, policy: Policy, positions: jax.Array, segments: jax.Array
) -> Attend:
    """Causal attention of prompts padded on the right to themselves.

    Where the implementation chosen for decoding has no prefill for this model, the plain version
    runs, and a warning says so.

    Args:
      name: as `attention_choice.resolve` gave it for `DECODING`.
      positions, segments: [rows, T] int32, as `Policy.self_attention` takes them.
    """
    settings = policy.attention_settings
    name = attention_choice.fitting(name, PREFILL, settings)
    return PREFILL.table[name].attend(settings, positions, segments)


def _plain(layout: CacheLayout, soft_cap: float | None, mesh: Mesh | None) -> AttendPart:
    transposed = layout.transposed_keys
    plain = functools.partial(
        group_attention.attend_part, soft_cap=soft_cap, transposed_keys=transposed
    )
    at_home = _of_each_device(plain, mesh)

    def attend(q, kv, index, reach: Reach, table=None) -> Part:
        # The partitioner splits the plain version, but would gather the pages of all devices.
        return (plain if table is None else at_home)(q, kv, index, reach, table)

    return attend


def _tpu(layout: CacheLayout, soft_cap, mesh, *, interpret=False) -> AttendPart:
    del layout
    kernel = functools.partial(decode_tpu.attend_part, soft_cap=soft_cap, interpret=interpret)
    return _of_each_device(kernel, mesh)


def _gpu(layout: CacheLayout, soft_cap, mesh) -> AttendPart:
    del layout
    return _of_each_device(functools.partial(decode_gpu.attend_part, soft_cap=soft_cap), mesh)


def _of_each_device(kernel: AttendPart, mesh: Mesh | None) -> AttendPart:
    """A kernel that every device runs on its share of the rows and heads."""
    by_row, by_head = ("batch",), ("batch", "kv_heads")

    def attend(q, kv, index, reach: Reach, table=None) -> Part:
        stacked = isinstance(kv, LayerKV)
        rows = kv_cache.any_layer(kv).v.shape[-4]

        def local(q, kv, index, origin, back, length, *tables):
            index = index if stacked else 0  # of a tuple it is a number of Python
            reach_here = Reach(origin, back, length, reach.ring)
            if not tables:
                return kernel(q, kv, index, reach_here)
            rows_here = kv_cache.any_layer(kv).v.shape[-4]
            return kernel(q, kv, index, reach_here, tables[0] % rows_here)

        of_layer, stored = ((None, *by_head), kv) if stacked else (by_head, (kv[index],))
        index = index if stacked else 0
        tables = () if table is None else (table,)
        return on_each_device(
            local,
            mesh,
            {"batch": math.gcd(q.shape[0], rows), "kv_heads": q.shape[1]},
            in_axes=(by_head, of_layer, (), by_row, by_row, by_row, *(by_row for _ in tables)),
            out_axes=by_head,
        )(q, stored, index, reach.origin, reach.back, reach.length, *tables)

    return attend


def _layout_obstacle(layout: CacheLayout) -> str:
    if not layout.stacked or layout.transposed_keys:
        return "reads layers that are stacked, with keys that are not transposed"
    return ""


def _tpu_obstacle(layout: CacheLayout) -> str:
    for D in (part.head_dim for part in layout.parts):
        if D % decode_tpu.LANES:
            return f"needs a head_dim that is a multiple of {decode_tpu.LANES}; given {D}"
    return _layout_obstacle(layout)


def _gpu_obstacle(layout: CacheLayout) -> str:
    if why := decode_gpu.obstacle():
        return why
    if jnp.dtype(layout.dtype) == jnp.int8:
        return "has no int8 cache, which was asked for; bfloat16 is one that it has"
    for D in (part.head_dim for part in layout.parts):
        if D & (D - 1) or D > decode_gpu.MOST_HEAD_DIM:
            most = decode_gpu.MOST_HEAD_DIM
            return f"needs a head_dim that is a power of two up to {most}; given {D}"
    return "" if not layout.transposed_keys else "reads keys that are not transposed"


# (layout, soft_cap, mesh) -> AttendPart
DECODING = Use(
    "decoding",
    {
        "xla": Implementation(_plain),
        "pallas_tpu": Implementation(_tpu, ("tpu",), _tpu_obstacle),
        "pallas_gpu": Implementation(_gpu, ("gpu",), _gpu_obstacle),
        "pallas_tpu_interpret": Implementation(
            functools.partial(_tpu, interpret=True), (), _tpu_obstacle
        ),
    },
    {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",)},
)

# The name chosen for decoding decides prefill too; (settings, positions, segments) -> Attend
PREFILL = Use("prefill", ROWS.table, ROWS.preferred)
