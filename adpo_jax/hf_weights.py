"""Hugging Face safetensors <-> the stacked, sharded parameter tree.

`TENSORS` says where every parameter lies in a checkpoint; loading and saving both follow it. Only
contiguous slices are copied on the host, straight from the mapped file and only those that a device
needs; transposing, casting and the check for NaN happen on the devices.

Letters: V vocabulary, D model width, H heads, K key/value heads, h head dimension, F width of the
MLP.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from adpo_jax.model import ModelConfig

DISK_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter's place in a checkpoint.

    Attributes:
      hf_name: below `model.layers.<i>.` for a parameter of a layer.
      hf_axes: the dimensions on disk; "Hh D" is a matrix [H * h, D].
      axes: the same letters in the order of the parameter tree (without its leading layers).
    """

    hf_name: str
    hf_axes: str
    axes: str

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from the letters on disk to those of the tree."""
        return tuple(self.hf_axes.replace(" ", "").index(axis) for axis in self.axes)


TOP_TENSORS = {
    "embed": Tensor("model.embed_tokens.weight", "V D", "VD"),
    "final_norm": Tensor("model.norm.weight", "D", "D"),
    "head": Tensor("lm_head.weight", "V D", "DV"),
}
LAYER_TENSORS = {
    "attn_norm": Tensor("input_layernorm.weight", "D", "D"),
    "q": Tensor("self_attn.q_proj.weight", "Hh D", "DHh"),
    "k": Tensor("self_attn.k_proj.weight", "Kh D", "DKh"),
    "v": Tensor("self_attn.v_proj.weight", "Kh D", "DKh"),
    "o": Tensor("self_attn.o_proj.weight", "D Hh", "HhD"),
    "q_bias": Tensor("self_attn.q_proj.bias", "Hh", "Hh"),
    "k_bias": Tensor("self_attn.k_proj.bias", "Kh", "Kh"),
    "v_bias": Tensor("self_attn.v_proj.bias", "Kh", "Kh"),
    "o_bias": Tensor("self_attn.o_proj.bias", "D", "D"),
    "q_norm": Tensor("self_attn.q_norm.weight", "h", "h"),
    "k_norm": Tensor("self_attn.k_norm.weight", "h", "h"),
    "mlp_norm": Tensor("post_attention_layernorm.weight", "D", "D"),
    "gate": Tensor("mlp.gate_proj.weight", "F D", "DF"),
    "up": Tensor("mlp.up_proj.weight", "F D", "DF"),
    "down": Tensor("mlp.down_proj.weight", "D F", "FD"),
    "gate_bias": Tensor("mlp.gate_proj.bias", "F", "F"),
    "up_bias": Tensor("mlp.up_proj.bias", "F", "F"),
    "down_bias": Tensor("mlp.down_proj.bias", "D", "D"),
}
# Gemma 2 and 3 put a norm on either side of attention and MLP: the same name, another place.
POST_NORM_TENSORS = {
    "attn_post_norm": Tensor("post_attention_layernorm.weight", "D", "D"),
    "mlp_norm": Tensor("pre_feedforward_layernorm.weight", "D", "D"),
    "mlp_post_norm": Tensor("post_feedforward_layernorm.weight", "D", "D"),
}

# Buffers that old versions of transformers wrote, computed from the config.
HARMLESS_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# A Gemma 3 checkpoint with pictures: the language model's prefixes, and what is left out.
GEMMA3_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
GEMMA3_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a model: its tensors on disk, one a layer (or one alone)."""

    path: tuple[str, ...]
    tensor: Tensor
    hf_names: tuple[str, ...]
    split_shape: tuple[int, ...]  # on disk, one dimension a letter
    hf_shape: tuple[int, ...]

    def of(self, params):
        """This leaf of a parameter tree."""
        return functools.reduce(lambda tree, key: tree[key], self.path, params)

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def order(self) -> tuple[int, ...]:
        """The transposition from disk to tree, stacked layers included."""
        if not self.stacked:
            return self.tensor.order
        return (0, *(axis + 1 for axis in self.tensor.order))


def leaves(config: ModelConfig, params) -> list[Leaf]:
    """The checkpoint's view of a parameter tree, in the order of a checkpoint.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
    """
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim,
        "F": config.intermediate_size,
    }
    layer_tensors = LAYER_TENSORS | (POST_NORM_TENSORS if config.post_norms else {})

    def leaf(path, tensor, hf_names):
        groups = [[sizes[axis] for axis in group] for group in tensor.hf_axes.split()]
        split_shape = tuple(size for group in groups for size in group)
        return Leaf(path, tensor, hf_names, split_shape, tuple(math.prod(g) for g in groups))

    found = []
    for name, param in params["layers"].items():
        tensor = layer_tensors[name]
        hf_names = tuple(f"model.layers.{i}.{tensor.hf_name}" for i in range(param.shape[0]))
        found.append(leaf(("layers", name), tensor, hf_names))
    for name in params.keys() - {"layers"}:
        found.append(leaf((name,), TOP_TENSORS[name], (TOP_TENSORS[name].hf_name,)))
    order = [*TOP_TENSORS, *layer_tensors]
    return sorted(found, key=lambda leaf: order.index(leaf.path[-1]))


# --- reading


def read_header(path: Path) -> dict[str, dict]:
    """Name -> {"dtype", "shape", "data_offsets" (within the file)} of a safetensors file.

    Source: https://huggingface.co/docs/safetensors, "Format".

    Raises:
      ValueError: naming the file where it is no safetensors file, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is no safetensors file, or is cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for entry in header.values():
                start, end = entry["data_offsets"]
                entry["data_offsets"] = (start + 8 + length, end + 8 + length)
                entry["shape"] = tuple(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has no valid safetensors header: {error}") from error
    needed = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed > size:
        raise ValueError(f"{path} is cut short: {size} bytes of {needed}; download it again")
    return header


class Checkpoint:
    """The tensors of one or several safetensors files, by name; mapped, not read."""

    def __init__(self, files: list[Path]):
        self._entries: dict[str, tuple[Path, dict]] = {}
        self._maps = {}
        for path in files:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise ValueError(f"{name} is both in {self._entries[name][0]} and in {path}")
                self._entries[name] = (path, entry)
            self._maps[path] = np.memmap(path, np.uint8, mode="r")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def rename(self, prefixes: dict[str, str], drop: re.Pattern) -> None:
        """Replaces prefixes of names, and forgets the tensors that `drop` matches."""

        def renamed(name):
            for old, new in prefixes.items():
                if name.startswith(old):
                    return new + name.removeprefix(old)
            return name

        self._entries = {
            renamed(name): entry for name, entry in self._entries.items() if not drop.match(name)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]["shape"]

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the file.

        Raises:
          ValueError: for a dtype that is no float of 16 or 32 bits, or a broken entry.
        """
        path, entry = self._entries[name]
        if entry["dtype"] not in DISK_DTYPES:
            raise ValueError(
                f"{name} in {path} has dtype {entry['dtype']}; supported: "
                f"{', '.join(DISK_DTYPES)}. Dequantise the checkpoint first."
            )
        dtype = DISK_DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        if end - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{name} in {path}: the header's shape and extent disagree")
        return self._maps[path][start:end].view(dtype).reshape(entry["shape"])


def load(config: ModelConfig, abstract_params, checkpoint: Checkpoint):
    """Reads the parameters, every leaf straight into its sharding.

    Args:
      abstract_params: `jax.ShapeDtypeStruct`s; without a sharding, on the default device.

    Raises:
      ValueError: naming the tensors that are missing, unexpected, of a wrong shape or not finite.
    """
    all_leaves = leaves(config, abstract_params)
    _account_for_all(config, all_leaves, checkpoint)
    params, finite = {"layers": {}}, []
    for leaf in all_leaves:
        abstract = leaf.of(abstract_params)
        param, finite_per_tensor = _to_tree_layout(
            _put(leaf, checkpoint, abstract.sharding),
            stacked=leaf.stacked,
            order=leaf.order,
            dtype=abstract.dtype,
            sharding=abstract.sharding,
        )
        if abstract.sharding is not None:
            # The same layout; in the words of the table too, which jit's cache compares.
            param = jax.device_put(param, abstract.sharding)
        # One parameter at a time in host memory: transfers would otherwise pile up.
        param.block_until_ready()
        (params["layers"] if leaf.stacked else params)[leaf.path[-1]] = param
        finite.append(finite_per_tensor)
    bad = [
        name
        for leaf, flags in zip(all_leaves, jax.device_get(finite))
        for name, ok in zip(leaf.hf_names, np.atleast_1d(flags))
        if not ok
    ]
    if bad:
        raise ValueError(f"weights with NaN or infinity: {_some(bad)}")
    return params


def _account_for_all(config: ModelConfig, all_leaves: list[Leaf], checkpoint: Checkpoint) -> None:
    wanted = {name: leaf.hf_shape for leaf in all_leaves for name in leaf.hf_names}
    head, embed = TOP_TENSORS["head"].hf_name, TOP_TENSORS["embed"].hf_name
    tied_copy = config.tie_embeddings and head in checkpoint
    missing = [name for name in wanted if name not in checkpoint]
    unexpected = [
        name
        for name in checkpoint
        if name not in wanted
        and not HARMLESS_TENSORS.search(name)
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
        raise ValueError("the weights do not fit config.json; " + "; ".join(problems))
    if tied_copy and not np.array_equal(checkpoint.array(head), checkpoint.array(embed)):
        raise ValueError(
            f"{head} differs from {embed}, but config.json ties them; "
            "set tie_word_embeddings to false"
        )


def _some(names: list[str], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _put(leaf: Leaf, checkpoint: Checkpoint, sharding: NamedSharding | None) -> jax.Array:
    """The parameter as it lies on disk (in the dtype of the disk), split over the devices."""
    arrays = [checkpoint.array(name).reshape(leaf.split_shape) for name in leaf.hf_names]
    dtypes = {array.dtype for array in arrays}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    shape = (len(arrays), *leaf.split_shape) if leaf.stacked else leaf.split_shape

    @functools.cache
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(*b) for b in bounds)
        if not leaf.stacked:
            return np.array(arrays[0][index], dtype)
        chosen = arrays[index[0]]
        out = np.empty((len(chosen), *(stop - start for start, stop in bounds[1:])), dtype)
        for i, array in enumerate(chosen):
            out[i] = array[index[1:]]
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


@functools.partial(jax.jit, static_argnames=("stacked", "order", "dtype", "sharding"))
def _to_tree_layout(x: jax.Array, *, stacked, order, dtype, sharding):
    """The parameter, and whether each of its tensors is finite."""
    x = jnp.transpose(x, order).astype(dtype)
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(int(stacked), x.ndim)))
    if sharding is None:
        return x, finite
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return (
        jax.lax.with_sharding_constraint(x, sharding),
        jax.lax.with_sharding_constraint(finite, everywhere),
    )


# --- writing


def save(config: ModelConfig, params, folder: Path, *, dtype, max_shard_size: int) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, into an existing folder.

    Tensors are gathered one at a time; a process holds one shard. On several processes all of them
    must call this, and process 0 writes.

    Args:
      dtype: on disk.
      max_shard_size: bytes.
    """
    dtype = np.dtype(dtype)
    shards = _shards(leaves(config, params), dtype.itemsize, max_shard_size)
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = "model.safetensors"
        if len(shards) > 1:
            file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for leaf, layer in shard:
            name = leaf.hf_names[layer or 0]
            weight_map[name] = file_name
            tensor = _gather(leaf, layer, leaf.of(params), dtype)
            if jax.process_index() == 0:
                tensors[name] = np.asarray(tensor)
        if jax.process_index() == 0:
            # transformers refuses a file that does not name its framework.
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if len(shards) > 1 and jax.process_index() == 0:
        size = sum(math.prod(leaf.hf_shape) * dtype.itemsize for s in shards for leaf, _ in s)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _shards(all_leaves: list[Leaf], itemsize: int, max_shard_size: int):
    """Lists of (leaf, layer), layer None for what stands outside the layers."""
    tensors = [
        (leaf, layer if leaf.stacked else None)
        for leaf in all_leaves
        for layer in range(len(leaf.hf_names))
    ]
    # Layer by layer, as readers of a part of a model expect: embeddings, layers, norm and head.
    num_layers = max(len(leaf.hf_names) for leaf in all_leaves)
    tensors.sort(
        key=lambda t: t[1] if t[1] is not None else -1 if t[0].path[0] == "embed" else num_layers
    )
    shards, used = [[]], 0
    for leaf, layer in tensors:
        size = math.prod(leaf.hf_shape) * itemsize
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append((leaf, layer))
        used += size
    return shards


def _gather(leaf: Leaf, layer: int | None, param: jax.Array, dtype) -> jax.Array:
    """One tensor as it lies on disk, on every device of the parameter."""
    sharding = param.sharding if isinstance(param, jax.Array) else None
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    else:
        sharding = None
    order = tuple(np.argsort(leaf.tensor.order).tolist())
    return _to_disk_layout(
        param, layer, order=order, shape=leaf.hf_shape, dtype=dtype, sharding=sharding
    )


@functools.partial(jax.jit, static_argnames=("order", "shape", "dtype", "sharding"))
def _to_disk_layout(param, layer, *, order, shape, dtype, sharding):
    x = param if layer is None else param[layer]
    x = jnp.transpose(x, order).reshape(shape).astype(dtype)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
