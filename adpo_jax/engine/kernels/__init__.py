"""Attention of the rollout engine: a table of implementations for decoding, and one for prefill.

The implementations of decoding take the same arguments as `group_attention.attend_part`, the plain
version that they are tested against. Prefill is attention of whole rows (`attention_kernels`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.engine import group_attention, kv_cache
from adpo_jax.engine.group_attention import AttendPart, Part, Reach
from adpo_jax.engine.kernels import decode_gpu, decode_tpu
from adpo_jax.engine.kv_cache import CacheLayout, LayerKV
from adpo_jax.model import attention_choice
from adpo_jax.model.attention import Attend
from adpo_jax.model.attention_choice import Implementation, Use
from adpo_jax.model.attention_kernels import ROWS
from adpo_jax.policy.policy import Policy


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
        if D & (D - 1):
            return f"needs a head_dim that is a power of two, as Triton does; given {D}"
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
