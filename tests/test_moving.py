"""Arrays that are laid out anew a part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from adpo_jax.devices import moving
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs

# Shape, layout before, layout after, over fsdp 8 and over fsdp 2 x tensor 4.
CASES = {
    "layers": ((5, 16, 24), (None, "fsdp", "tensor"), (None, None, "tensor")),
    "a vocabulary": ((40, 16), ("tensor", "fsdp"), ("tensor", None)),
    "one that comes last": ((16, 40), ("fsdp", "tensor"), (None, "tensor")),
    "layers that stay split": ((16, 24), ("fsdp", None), ("fsdp", None)),
    "nothing to cut by": ((8, 1), ("fsdp", None), (None, None)),
}


@pytest.mark.parametrize("part", [1, 400, 1 << 28])
@pytest.mark.parametrize("case", CASES)
def test_an_array_in_parts_is_the_array(case, part, monkeypatch):
    monkeypatch.setattr(moving, "PART_BYTES", part)
    shape, before, after = CASES[case]
    source = NamedSharding(make_mesh(data=1, fsdp=8), PartitionSpec(*before))
    target = NamedSharding(make_mesh(data=1, fsdp=2, tensor=4), PartitionSpec(*after))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    moved = moving.move({"x": jax.device_put(x, source)}, {"x": target})["x"]
    assert moved.sharding.is_equivalent_to(target, x.ndim)
    np.testing.assert_array_equal(moved, x)


def test_large_arrays_are_cut_along_an_axis_that_the_source_has_whole(monkeypatch):
    monkeypatch.setattr(moving, "PART_BYTES", 1000)
    found = {}
    for case, (shape, before, after) in CASES.items():
        source = NamedSharding(make_mesh(data=1, fsdp=8), PartitionSpec(*before))
        target = NamedSharding(make_mesh(data=1, fsdp=2, tensor=4), PartitionSpec(*after))
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=source)
        found[case] = moving.cut_of(x, target)
    assert found["layers"] == (2, 4, 1, 6)
    assert found["a vocabulary"] == (0, 4, 4, 3)
    assert found["one that comes last"] == (1, 4, 4, 3)
    assert found["nothing to cut by"] is None


def test_what_stays_where_it_is_is_not_copied():
    sharding = NamedSharding(make_mesh(data=1, fsdp=8), PartitionSpec("fsdp"))
    x = jax.device_put(jnp.arange(16.0), sharding)
    there = [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
    moved = moving.move(x, sharding)
    assert [s.data.unsafe_buffer_pointer() for s in moved.addressable_shards] == there


def test_the_program_of_the_largest_part_needs_as_much_less_memory(monkeypatch):
    source = NamedSharding(make_mesh(data=1, fsdp=8), PartitionSpec(None, "fsdp", None))
    target = NamedSharding(make_mesh(data=1, fsdp=2, tensor=4), PartitionSpec(None, None, "tensor"))
    tree = {
        "large": jax.ShapeDtypeStruct((16, 64, 64), jnp.float32, sharding=source),
        "small": jax.ShapeDtypeStruct((2, 64, 64), jnp.float32, sharding=source),
        "there": jax.ShapeDtypeStruct((99, 64, 64), jnp.float32, sharding=target),
    }
    shardings = {"large": target, "small": target, "there": target}
    bytes_of = {}
    for part in (1 << 28, 1 << 14):
        monkeypatch.setattr(moving, "PART_BYTES", part)
        traced, count = moving.traced_part(tree, shardings)
        bytes_of[count] = traced.lower().compile().memory_analysis().temp_size_in_bytes
    whole, cut = bytes_of[2], bytes_of[16 + 2]
    assert 8 * cut <= whole
    assert moving.traced_part({"there": tree["there"]}, {"there": target}) is None


def test_parameters_move_in_the_order_of_their_names(monkeypatch):
    """Not in that of a set, which differs between processes, who would wait for each other."""
    policy, params = tiny.policy_and_params(make_mesh(data=1, fsdp=8))
    moved = []

    def move(tree, shardings):
        moved.extend(jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree))
        return tree

    monkeypatch.setattr(moving, "move", move)
    layout = CacheLayout(2, 2, 8, jnp.float32, stacked=True, transposed_keys=False)
    backwards = dict(reversed(params.items()))
    Verbs(policy, layout).load_params(backwards)
    outer = [name for name in moved if "layers" not in name]
    assert len(outer) == 2 + ("head" in params)
    assert moved == sorted(outer) + sorted(name for name in moved if "layers" in name)
