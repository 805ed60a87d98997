"""Which devices exchange with each other in a collective, from the text of its attributes.

Devices are numbered in the order of the program's mesh.
"""

import math
import re

import numpy as np


def device_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The devices that exchange with each other, from the attributes of a collective.

    They are listed, or the rows of an array of all numbers that has been reshaped and transposed
    (xla/hlo/ir/tile_assignment.h), or those that differ in some axes of a mesh alone. A pair of a
    permutation is a group.

    Raises:
      ValueError: for attributes that say it in another way.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}", attributes)
    if listed:
        groups = re.findall(r"\{([\d, ]+)\}", listed.group(1) or "")
        everyone = [list(range(num_devices))]
        return [_ints(group) for group in groups] or everyone
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        shape, dims, order = (_ints(part) if part else None for part in tiled.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return devices.transpose(order).reshape(shape).tolist()
    of_mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r"\s*\{([^}]*)\}",
        attributes,
    )
    if of_mesh:
        return _groups_of_mesh(*of_mesh.groups())
    raise ValueError(f"no groups of devices in {attributes[:200]!r}")


def _groups_of_mesh(
    mesh: str, dims: str | None, order: str | None, together: str
) -> list[list[int]]:
    """The rows of a mesh's devices along some axes.

    Args:
      mesh: the axes with their sizes, 'a'=2,'b'=4.
      dims, order: the devices of the mesh are all numbers in this shape, transposed; None as it is.
      together: the axes, 'a' or 'b':(2)2 for the second half of an axis of 4 split in two by two.
    """
    axes = {name: [int(n)] for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    chosen = {}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", together):
        chosen[name] = 0
        if size:
            axes[name] = [int(before), int(size), axes[name][0] // int(before) // int(size)]
            chosen[name] = 1
    parts = [(name, nth) for name, sizes in axes.items() for nth in range(len(sizes))]
    inner = [nth for nth, (name, part) in enumerate(parts) if chosen.get(name) == part]
    outer = [nth for nth in range(len(parts)) if nth not in inner]
    devices = np.arange(math.prod(map(math.prod, axes.values())))
    if dims:
        devices = devices.reshape(_ints(dims)).transpose(_ints(order) if order else None)
    devices = devices.reshape([size for sizes in axes.values() for size in sizes])
    size = math.prod(devices.shape[nth] for nth in inner)
    return devices.transpose(outer + inner).reshape(-1, size).tolist()


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
