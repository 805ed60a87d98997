"""Hugging Face safetensors <-> the stacked, sharded parameter tree.

`hf/tensors.py` says where each parameter lies.

The host copies contiguous slices alone, straight from the mapped file, and only those that a device
needs. Transposing, casting and the check for NaN happen on the devices.
"""

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from adpo_jax.hf.safetensors_files import Checkpoint
from adpo_jax.hf.tensors import Leaf, by_tensor, is_read_nowhere, joined, leaves
from adpo_jax.model import lora, parameters
from adpo_jax.model.model_config import ModelConfig

# --- reading

# A matrix of one expert, which some checkpoints have in a tensor of all of them.
EXPERT_APART = re.compile(r"\.mlp\.experts\.\d+\.")


def load(config: ModelConfig, abstract_params, checkpoint: Checkpoint):
    """Reads the parameters, every leaf straight into its sharding.

    Args:
      abstract_params: `jax.ShapeDtypeStruct`s; without a sharding, on the default device.

    Raises:
      ValueError: naming the tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    all_leaves = leaves(config, abstract_params)
    if any(EXPERT_APART.search(name) for leaf in all_leaves for name in leaf.hf_names):
        checkpoint.part_experts(config.mixture.num_experts)
    _account_for_all(config, all_leaves, checkpoint)
    params, finite = {"layers": {}}, []
    for leaf in all_leaves:
        abstract = leaf.of(abstract_params)
        param, finite_per_tensor = _to_tree_layout(
            _put(leaf, checkpoint, abstract.sharding),
            stack=len(leaf.stack),
            order=leaf.order,
            dtype=abstract.dtype,
            sharding=abstract.sharding,
        )
        if abstract.sharding is not None:
            # The layout is the same, but jit's cache compares the words of the sharding too.
            param = jax.device_put(param, abstract.sharding)
        # One parameter at a time is in host memory, since transfers would otherwise pile up.
        param.block_until_ready()
        (params["layers"] if leaf.stacked else params)[leaf.path[-1]] = param
        finite.append(finite_per_tensor)
    bad = [
        name
        for leaf, flags in zip(all_leaves, jax.device_get(finite))
        for name, ok in zip(leaf.hf_names, np.ravel(flags))
        if not ok
    ]
    if bad:
        raise ValueError(f"weights with NaN or infinity: {_some(bad)}")
    return params


def _account_for_all(config: ModelConfig, all_leaves: list[Leaf], checkpoint: Checkpoint) -> None:
    wanted = {name: leaf.hf_shape for leaf in all_leaves for name in leaf.hf_names}
    head, embed = (parameters.at((name,)).hf_name for name in ("head", "embed"))
    tied_copy = config.tie_embeddings and head in checkpoint
    missing = [name for name in wanted if name not in checkpoint]
    unexpected = [
        name
        for name in checkpoint
        if name not in wanted
        and not is_read_nowhere(config, name)
        and not (tied_copy and name == head)
    ]
    shapes = [
        f"{name} (wanted {list(shape)}, got {list(checkpoint.shape(name))})"
        for name, shape in wanted.items()
        if name in checkpoint and checkpoint.shape(name) != shape
    ]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("tensors of a wrong shape", shapes),
        )
        if names
    ]
    if problems:
        cure = ""
        if missing == [head] and embed in checkpoint:
            cure = "; if the embeddings are the head too, set tie_word_embeddings to true"
        raise ValueError("the weights do not fit config.json; " + "; ".join(problems) + cure)
    if tied_copy and not np.array_equal(checkpoint.array(head), checkpoint.array(embed)):
        raise ValueError(
            f"{head} differs from {embed}, but config.json ties them; "
            "set tie_word_embeddings to false"
        )


def _some(names: list[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _put(leaf: Leaf, checkpoint: Checkpoint, sharding: NamedSharding | None) -> jax.Array:
    """The parameter in the layout and dtype of the disk, split over the devices."""
    tensors = [leaf.part(checkpoint.array(name)) for name in leaf.hf_names]
    arrays = [tensor.reshape(leaf.split_shape) for tensor in tensors]
    dtypes = {array.dtype for array in arrays}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    shape = (*leaf.stack, *leaf.split_shape)
    depth = len(leaf.stack)

    @functools.cache
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(*b) for b in bounds[depth:])
        out = np.empty([stop - start for start, stop in bounds], dtype)
        for place in np.ndindex(out.shape[:depth]):
            number = 0
            for i, (start, _), size in zip(place, bounds, leaf.stack):
                number = number * size + start + i
            out[place] = arrays[number][index]
        return out

    whole = tuple((0, size) for size in shape)
    if sharding is None:
        return jnp.asarray(read(whole))
    spec = [None] * len(shape)
    for tree_axis, names in enumerate(sharding.spec):
        spec[leaf.order[tree_axis]] = names
    return jax.make_array_from_callback(
        shape,
        NamedSharding(sharding.mesh, PartitionSpec(*spec)),
        lambda index: read(tuple(s.indices(n)[:2] for s, n in zip(index, shape))),
    )


@functools.partial(jax.jit, static_argnames=("stack", "order", "dtype", "sharding"))
def _to_tree_layout(x: jax.Array, *, stack, order, dtype, sharding):
    """The parameter, and whether each of its tensors is finite."""
    x = jnp.transpose(x, order).astype(dtype)
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(stack, x.ndim)))
    if sharding is None:
        return x, finite
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return (
        jax.lax.with_sharding_constraint(x, sharding),
        jax.lax.with_sharding_constraint(finite, everywhere),
    )


# --- writing


def save(
    config: ModelConfig,
    params,
    folder: Path,
    *,
    dtype,
    max_shard_size: int,
    lora_scale: float = 1.0,
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, into an existing folder.

    Adapters are merged into their weights.

    Tensors are gathered one at a time; a process holds one shard. On several processes all of them
    must call this, and process 0 writes.

    Args:
      dtype: dtype on disk, but for what is float32 whatever the others are.
      max_shard_size: bytes of a shard.
    """
    dtype = np.dtype(dtype)
    shards = _shards(leaves(config, lora.without_adapters(params)), dtype, max_shard_size)
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for parts, number in shard:
            name = parts[0].hf_names[number]
            weight_map[name] = file_name
            gathered = [_gather(part, number, params, lora_scale, dtype) for part in parts]
            if jax.process_index() == 0:
                arrays = list(map(np.asarray, gathered))
                tensors[name] = joined(parts, arrays)
        if jax.process_index() == 0:
            # transformers refuses a file that does not name its framework.
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if len(shards) > 1 and jax.process_index() == 0:
        size = sum(_num_bytes(parts, dtype) for shard in shards for parts, _ in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _num_bytes(parts: Sequence[Leaf], dtype) -> int:
    """Bytes on disk of the tensor of these leaves."""
    return math.prod(parts[0].hf_shape) * np.dtype(parts[0].parameter.dtype(dtype)).itemsize


def _shards(all_leaves: list[Leaf], dtype, max_shard_size: int):
    """Lists of (the leaves of a tensor, the number of the tensor among those of the leaves)."""
    tensors = [
        (parts, number)
        for parts in by_tensor(all_leaves)
        for number in range(len(parts[0].hf_names))
    ]

    # Embeddings come first, then layer by layer, then norm and head, as readers of a part expect.
    def place(tensor) -> float:
        (leaf, *_), number = tensor
        if leaf.stacked:
            return leaf.layers[leaf.place(number)[0]]
        return -1 if leaf.path[0] == "embed" else math.inf

    tensors.sort(key=place)
    shards, used = [[]], 0
    for parts, number in tensors:
        size = _num_bytes(parts, dtype)
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append((parts, number))
        used += size
    return shards


def _gather(leaf: Leaf, number: int, params, lora_scale: float, dtype) -> jax.Array:
    """One tensor in the layout of the disk, whole on every device of the parameter."""
    param = leaf.of(params)
    adapter = lora.adapter_of(params, leaf.path[-1])
    sharding = param.sharding if isinstance(param, jax.Array) else None
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    else:
        sharding = None
    return _to_disk_layout(
        param,
        leaf.place(number),
        adapter,
        scale=lora_scale,
        has_experts=leaf.parameter.one_tensor_for_all,
        order=leaf.disk_order,
        shape=leaf.part_shape,
        dtype=np.dtype(leaf.parameter.dtype(dtype)),
        sharding=sharding,
    )


@functools.partial(
    jax.jit, static_argnames=("scale", "has_experts", "order", "shape", "dtype", "sharding")
)
def _to_disk_layout(param, place, adapter, *, scale, has_experts, order, shape, dtype, sharding):
    x = param[place]
    if adapter is not None:
        merge = jax.vmap(lora.merged, (0, 0, 0, None)) if has_experts else lora.merged
        x = merge(x, *(matrix[place] for matrix in adapter), scale)
    x = jnp.transpose(x, order).reshape(shape).astype(dtype)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
