"""The device mesh and the one table that says how every array lies on it.

Arrays are described by logical axes ("heads", "mlp", "batch", ...). `RULES` maps a logical axis to
mesh axes. Mesh axes: `data` (replicas of the parameters), `fsdp` (parameters and batch split),
`tensor` (heads, hidden width of the MLP and vocabulary split). A mesh may have two more: `sequence`
(parameters and the tokens of a packed stream split) and, for a mixture of experts, `expert`
(experts and batch split). A rule that names one of them leaves other meshes as they are.

Training arrays lie on one mesh over all devices of all processes. Rollouts run on a mesh of each
process's own devices (`rollout_mesh`), so that processes decode without waiting for each other.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor", "expert")
_OPTIONAL = ("sequence", "expert")  # a mesh has them where their size is not 1
_REPLICAS = "data"  # the axis along which the parameters are repeated

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    "layers": None,
    "embed": ("fsdp", "sequence"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
    "rank": None,
    "expert": "expert",
}

# Axes which are replicated where the mesh does not divide them: few key/value heads (GQA) and odd
# vocabulary sizes are common. Every other axis must divide.
MAY_REPLICATE = frozenset({"kv_heads", "vocab"})


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices=None,
    *,
    sequence: int = 1,
    expert: int = 1,
    dcn_data: int = 0,
) -> Mesh:
    """A mesh over all devices.

    Where the devices are several slices (TPU slices, or GPU nodes), only the axis `data` reaches
    over the slow network between them: the axes lie within a slice, and each slice has replicas of
    the parameters.

    Args:
      data, fsdp, tensor: axis sizes within a slice; one of them may be -1, meaning "the rest".
      devices: defaults to `jax.devices()`.
      sequence, expert: sizes of these axes; a mesh has each of them if its size is not 1.
      dcn_data: slices that `data` reaches over, so that the axis is `dcn_data` times `data` long; 0
        for as many as there are, 1 to lay the axes over all slices as if they were one. Devices
        that name no slice are one slice, or with 2 or more those of each process are one.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices, or `dcn_data` is not the
        number of slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = _slices(devices, of_processes=dcn_data > 1)
    if dcn_data not in (0, 1, len(slices)):
        raise ValueError(
            f"dcn_data is 0, 1 or the number of slices, {len(slices)} here; given {dcn_data}"
        )
    one = len(slices) == 1
    num_slices = 1 if dcn_data == 1 else len(slices)
    given = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor, "expert": expert}
    sizes = resolve_mesh_sizes(given, len(devices) // num_slices)
    # A tensor axis of 4 on a torus of 8 x 8 is half a row: splitting a physical axis is allowed.
    allow = devices[0].platform == "tpu"
    if num_slices == 1 and not one:
        grid = np.array([device for of_slice in slices for device in of_slice]).reshape(sizes)
    else:
        grids = [
            mesh_utils.create_device_mesh(sizes, devices=s, allow_split_physical_axes=allow)
            for s in slices
        ]
        grid = np.concatenate(grids, axis=MESH_AXES.index("data"))
    return _mesh(grid)


def _slices(devices: Sequence, *, of_processes: bool) -> list[list]:
    """The devices of each slice, in the order of the slices' numbers.

    Args:
      of_processes: whether devices that name no slice are told apart by their processes.
    """
    slices = collections.defaultdict(list)
    for number, device in zip(slice_numbers(devices, of_processes=of_processes), devices):
        slices[number].append(device)
    return [slices[number] for number in sorted(slices)]


def slice_numbers(devices: Sequence, *, of_processes: bool = False) -> list[int]:
    """The slice of each device; devices that name none are in slice 0.

    Args:
      of_processes: whether devices that name no slice are told apart by their processes.
    """
    numbers = [getattr(device, "slice_index", 0) for device in devices]
    if of_processes and len(set(numbers)) == 1:
        numbers = [device.process_index for device in devices]
    return numbers


def rollout_mesh(mesh: Mesh, tensor: int = 0) -> Mesh:
    """The mesh of this process's own devices, on which it samples.

    Each group of `tensor` devices has a copy of the parameters. The axis `fsdp` has size 1, since
    with parameters split over it every decode step would gather all of them.

    Args:
      mesh: the mesh of training, over the devices of all processes.
      tensor: devices that one copy of the parameters is split over; 0 for as many as in training,
        up to what a process has.

    Raises:
      ValueError: when a process's devices do not divide into groups of `tensor`.
    """
    mine = [d for d in mesh.devices.flat if d.process_index == _own_process(mesh)]
    return _rollout_mesh(mine, mesh, tensor)


def _own_process(mesh: Mesh) -> int:
    """The number of this process; that of the mesh's first one if the mesh has none of ours."""
    indices = {d.process_index for d in mesh.devices.flat}
    return jax.process_index() if jax.process_index() in indices else min(indices)


def _rollout_mesh(devices: list, mesh: Mesh, tensor: int) -> Mesh:
    tensor = tensor or math.gcd(mesh.shape["tensor"], len(devices))
    expert = math.gcd(mesh_axis_size(mesh, "expert"), len(devices) // tensor or 1)
    if len(devices) % tensor:
        raise ValueError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size is {tensor}, which does not "
            f"divide the {len(devices)} device(s) of a process; rollouts run within a process"
        )
    copies = len(devices) // (tensor * expert)
    return _mesh(np.array(devices).reshape(copies, 1, 1, tensor, expert))


def _mesh(grid: np.ndarray) -> Mesh:
    """The mesh of a grid whose axes are those of `MESH_AXES`."""
    sizes = dict(zip(MESH_AXES, grid.shape))
    sizes = {name: n for name, n in sizes.items() if n > 1 or name not in _OPTIONAL}
    kinds = (AxisType.Auto,) * len(sizes)
    return Mesh(grid.reshape(tuple(sizes.values())), tuple(sizes), axis_types=kinds)


def resolve_mesh_sizes(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
    """Axis sizes with -1 filled in, whose product is the number of devices.

    Args:
      sizes: the axes by name; one of them may be -1.

    Raises:
      ValueError: for sizes that make no mesh of so many devices.
    """
    told = {name: n for name, n in sizes.items() if n != 1 or name not in _OPTIONAL}
    given = ", ".join(f"{name}={n}" for name, n in told.items())
    values = tuple(sizes.values())
    if any(s < 1 and s != -1 for s in values) or values.count(-1) > 1:
        raise ValueError(f"mesh sizes are positive, at most one of them -1; given {given}")
    known = math.prod(s for s in values if s != -1)
    rest, remainder = divmod(num_devices, known)
    if remainder or (-1 not in values and rest != 1):
        raise ValueError(
            f"the mesh needs {' x '.join(told)} = {num_devices} devices; given {given}. "
            "Set one axis to -1 to take the rest."
        )
    return tuple(rest if s == -1 else s for s in values)


def of_replicas(
    function: Callable, mesh: Mesh, in_axes: tuple[str | None, ...], out_axes: tuple
) -> Callable:
    """Makes a function of whole arrays that each replica of the parameters runs on its own share.

    Replicas lie along the mesh axis `data`. Within the function a batch is that of a replica, and
    the functions of this module see a mesh on which `data` splits nothing (`seen`), so that all
    else is laid out as ever. What the function sums over the axis `data` is exchanged where it says
    so, and nowhere else.

    Args:
      in_axes: for each argument "batch" where the leading axis of its arrays is split over the
        replicas, None where they all have it whole.
      out_axes: the same for each result.
    """

    def spec(axis):  # numbers have no axis to name
        return PartitionSpec() if axis is None else PartitionSpec(_REPLICAS)

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(map(spec, in_axes)),
        out_specs=tuple(map(spec, out_axes)),
        axis_names={_REPLICAS},
        check_vma=False,
    )


def sum_of_replicas(tree):
    """The sum of every array over the replicas, within `of_replicas`."""
    return jax.lax.psum(tree, _REPLICAS)


def num_replicas(mesh: Mesh | None) -> int:
    """The number of replicas of the parameters that train together."""
    return 1 if mesh is None else mesh.shape[_REPLICAS]


def seen(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh as code sees it where it is traced: another one within `of_replicas` alone."""
    here = jax.sharding.get_abstract_mesh()
    return here if here.manual_axes == (_REPLICAS,) else mesh


def first_device(mesh: Mesh | None) -> jax.Device:
    """A device of the mesh, which need not be there to compile for; the default one for no mesh."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
    """Options of XLA for a program whose products have many tokens on a side.

    On a GPU the products of one input stay apart: XLA would copy their operands side by side first,
    which takes longer than it spares. And its kernels are launched one by one: XLA would mend a
    graph of them before each step, since arrays lie elsewhere, and an H200 waits 10 ms for 1,900.
    """
    if first_device(mesh).platform != "gpu":
        return {}
    return {
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_gpu_graph_min_graph_size": np.iinfo(np.int32).max,
    }


def shard_map(
    function: Callable, mesh: Mesh, in_specs, out_specs, *, check_vma: bool = False
) -> Callable:
    """`jax.shard_map` over all axes of the mesh that are `seen`."""
    mesh = seen(mesh)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(splitting_axes(mesh)),
        check_vma=check_vma,
    )


def splitting_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh that arrays may be split over where this is traced."""
    return tuple(name for name in mesh.axis_names if name not in seen(mesh).manual_axes)


def partition_spec(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises:
      ValueError: for an unknown logical axis, or a dimension that its mesh axes do not divide
        (unless the axis is in `MAY_REPLICATE`).
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {axes} do not fit the shape {shape}")
    spec = []
    for axis, size in zip(axes, shape):
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {sorted(RULES)}")
        names = rule(mesh, axis) if axis is not None else None
        parts = mesh_axis_size(mesh, names)
        if size % parts:
            if axis not in MAY_REPLICATE:
                raise ValueError(
                    f"the mesh splits {axis!r} in {parts}, which does not divide its size {size}; "
                    f"choose mesh sizes that do ({dict(mesh.shape)} given)"
                )
            names = None
        spec.append(names)
    return PartitionSpec(*spec)


def rule(mesh: Mesh, axis: str) -> str | tuple[str, ...] | None:
    """The axes of a mesh that split a logical axis; of one alone its name."""
    known = splitting_axes(mesh)
    names = tuple(name for name in names_of(RULES[axis]) if name in known)
    return names if len(names) > 1 else next(iter(names), None)


def names_of(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names among what `rule` gives."""
    return (axes,) if isinstance(axes, str) else axes or ()


def mesh_axis_size(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
    """The number of parts that these mesh axes make."""
    known = splitting_axes(mesh)
    return math.prod(mesh.shape[n] for n in names_of(names) if n in known)


def axes_that_split(mesh: Mesh | None, axis: str, size: int) -> str | tuple[str, ...] | None:
    """The mesh axes that split a dimension with this logical axis; None where they cannot."""
    parts = 1 if mesh is None else mesh_axis_size(mesh, RULES[axis])
    return rule(mesh, axis) if parts > 1 and size % parts == 0 else None


def on_each_device(
    function: Callable, mesh: Mesh | None, sizes: Mapping[str, int], in_axes: tuple, out_axes: tuple
) -> Callable:
    """Makes a function of whole arrays that each device runs on its own share of them.

    Kernels need it, since the partitioner cannot split them. So do gathers that stay on a device,
    since the partitioner moves all arrays that it cannot prove to be local.

    Args:
      function: a function of pytrees of arrays, which needs nothing of another device's share.
      sizes: sizes of the logical axes to split. An axis that the mesh does not divide stays whole.
      in_axes: for each argument, the logical axes of all its arrays; trailing ones may be left out.
      out_axes: the logical axes of the result's arrays likewise.

    Returns:
      The function of the whole arrays; on one device it is `function` itself.
    """
    if mesh is None or mesh.size == 1:
        return function
    split = {axis: axes_that_split(mesh, axis, size) for axis, size in sizes.items()}

    def spec(axes):
        return PartitionSpec(*(split.get(axis) for axis in axes))

    return shard_map(function, mesh, tuple(map(spec, in_axes)), spec(out_axes))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape) -> NamedSharding:
    """`partition_spec` bound to its mesh."""
    return NamedSharding(seen(mesh), partition_spec(mesh, axes, tuple(shape)))


def device_bytes(tree) -> int:
    """Bytes on one device of a tree of abstract arrays; one without a sharding counts whole."""

    def of(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Pins the layout of an intermediate inside jit; without a mesh, the identity.

    A dimension that the mesh does not divide is left to the compiler.
    """
    if mesh is None or mesh.size == 1:
        return x
    spec = [
        None if axis is None else axes_that_split(mesh, axis, size)
        for axis, size in zip(axes, x.shape)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(seen(mesh), PartitionSpec(*spec)))


@dataclasses.dataclass(frozen=True)
class BatchSharding:
    """Puts arrays on a mesh, rows split over (`data`, `fsdp`); on one device without a mesh."""

    mesh: Mesh | None

    @property
    def num_shards(self) -> int:
        return 1 if self.mesh is None else mesh_axis_size(self.mesh, RULES["batch"])

    @property
    def num_shares(self) -> int:
        """The devices that each have a share of a packed stream."""
        return 1 if self.mesh is None else mesh_axis_size(self.mesh, RULES["length"])

    def abstract(self, tree):
        """The shapes and shardings of `put`'s result."""
        sharding = NamedSharding(self.mesh, PartitionSpec(rule(self.mesh, "batch")))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), tree
        )

    def put(self, tree):
        """Puts host arrays with a leading batch axis on the devices, split over that axis."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        sharding = NamedSharding(self.mesh, PartitionSpec(rule(self.mesh, "batch")))
        if self.mesh.is_multi_process:
            # Every process has the whole batch and puts its own rows.
            return jax.tree.map(
                lambda x: jax.make_array_from_callback(
                    x.shape, sharding, np.asarray(x).__getitem__
                ),
                tree,
            )
        return jax.device_put(tree, sharding)  # all at once: each call waits for the host
