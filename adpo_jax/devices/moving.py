"""Lays arrays out anew over devices, large ones a part at a time.

XLA gathers an array whole on every device before each takes its share of it: for one matrix of all
layers of Qwen3-32B, from 256 chips to the four of each host, 19.5 GiB of temporaries on each. Of a
part it is as much less. The parts are slices of an axis that the source does not split, such as
that of the layers. What the source splits as the target does, such as the vocabulary, is cut within
each share.
"""

import collections
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Bytes of an array, on all devices together, that are moved at once.
PART_BYTES = 2**27


class Cut(NamedTuple):
    """How an array is cut: its `axis`, in so many shares, has `size` of each in a part."""

    axis: int
    shares: int
    size: int
    parts: int

    def seen(self, x: jax.Array) -> jax.Array:
        """The array with the axis as two, the shares and what is in each."""
        shape = x.shape
        rest = shape[self.axis] // self.shares
        return x.reshape(*shape[: self.axis], self.shares, rest, *shape[self.axis + 1 :])

    def split(self, sharding: NamedSharding) -> NamedSharding:
        """How that lies on devices on which the array lies like this."""
        axes = [*sharding.spec, *[None] * (self.axis + 1 - len(sharding.spec))]
        spec = PartitionSpec(*axes[: self.axis + 1], None, *axes[self.axis + 1 :])
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)

    def starts(self, shape: tuple[int, ...]) -> Iterator[int]:
        """Where parts begin; the last one ends with the share, and may have some of another."""
        length = shape[self.axis] // self.shares
        return (min(i * self.size, length - self.size) for i in range(self.parts))


def cut_of(x, target: NamedSharding) -> Cut | None:
    """How an array is cut to get another layout; None where it is moved whole.

    Args:
      x: an array, or the shape of one with its `NamedSharding`.
    """
    parts = -(-math.prod(x.shape) * x.dtype.itemsize // PART_BYTES)
    if parts == 1 or not isinstance(x.sharding, NamedSharding) or x.sharding.mesh.size == 1:
        return None
    before, after = (sharding.shard_shape(x.shape) for sharding in (x.sharding, target))
    lengths = {
        axis: theirs
        for axis, (size, ours, theirs) in enumerate(zip(x.shape, before, after))
        if ours in (size, theirs)
    }
    axis = max(lengths, key=lengths.get, default=None)
    if axis is None or lengths[axis] == 1:
        return None
    size = -(-lengths[axis] // parts)
    return Cut(axis, x.shape[axis] // lengths[axis], size, -(-lengths[axis] // size))


def move(tree, shardings):
    """Lays arrays out anew on the devices of this process.

    Args:
      tree: arrays on a mesh of all processes, or of this process.
      shardings: a tree of `NamedSharding`s over devices of this process.
    """
    return jax.tree.map(_moved, tree, shardings)


def _moved(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if x.is_fully_addressable:
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return jax.device_put(x, sharding)
        return _in_parts(x, sharding)
    # Every process gets a copy likewise.
    copies = _in_parts(x, _on_every_process(x.sharding.mesh, sharding))
    mine = [shard.data for shard in copies.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, mine)


def _on_every_process(mesh: Mesh, sharding: NamedSharding) -> NamedSharding:
    """A copy on each process of a mesh, laid out there as `sharding` says for one of them."""
    by_process = collections.defaultdict(list)
    for device in mesh.devices.flat:
        by_process[device.process_index].append(device)
    local = sharding.mesh
    grid = np.array([by_process[p] for p in sorted(by_process)])
    everywhere = Mesh(grid.reshape(-1, *local.devices.shape), ("process", *local.axis_names))
    return NamedSharding(everywhere, sharding.spec)


def _in_parts(x: jax.Array, target: NamedSharding) -> jax.Array:
    cut = cut_of(x, target)
    if cut is None:
        return jax.device_put(x, target)
    source, of_parts = cut.split(x.sharding), cut.split(target)
    out = _empty(x.shape, x.dtype, target)
    for start in cut.starts(x.shape):
        part = jax.device_put(_taken(cut, source, x, start), of_parts)
        # Waiting for it keeps the parts from lying there all at once.
        out = jax.block_until_ready(_put(cut, target, out, part, start))
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape, dtype, sharding):
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _taken(cut: Cut, sharding: NamedSharding, x, start):
    part = jax.lax.dynamic_slice_in_dim(cut.seen(x), start, cut.size, axis=cut.axis + 1)
    return jax.lax.with_sharding_constraint(part, sharding)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _put(cut: Cut, sharding: NamedSharding, out, part, start):
    seen = jax.lax.dynamic_update_slice_in_dim(cut.seen(out), part, start, axis=cut.axis + 1)
    return jax.lax.with_sharding_constraint(seen.reshape(out.shape), sharding)


def traced_part(tree, shardings) -> tuple[jax.stages.Traced, int] | None:
    """The move of the largest part of some arrays as a program, and how many parts there are.

    Its devices are in the order of the target, as if the source had been in that order too: this
    changes who sends to whom, and neither bytes nor memory.

    Args:
      tree: shapes with `NamedSharding`s.
      shardings: over devices of one process.

    Returns:
      None where no array changes its layout.
    """
    parts = []
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings)):
        target = _on_every_process(x.sharding.mesh, sharding)
        devices = target.mesh.devices.reshape(x.sharding.mesh.devices.shape)
        source = NamedSharding(Mesh(devices, x.sharding.mesh.axis_names), x.sharding.spec)
        if source.is_equivalent_to(target, len(x.shape)):
            continue
        shape, count, cut = x.shape, 1, cut_of(x, target)
        if cut is not None:
            shape = list(jax.eval_shape(cut.seen, x).shape)
            shape[cut.axis + 1], count = cut.size, cut.parts
            source, target = cut.split(source), cut.split(target)
        part = jax.ShapeDtypeStruct(tuple(shape), x.dtype, sharding=source)
        parts.append((math.prod(shape) * x.dtype.itemsize, count, part, target))
    if not parts:
        return None
    _, _, part, target = max(parts, key=lambda part: part[0])
    moved = jax.jit(lambda x: x, out_shardings=target)
    return moved.trace(part), sum(count for _, count, *_ in parts)
