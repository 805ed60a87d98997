"""The kernels of decode attention against their plain version, and lowered for their machines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh

from adpo_jax import Policy
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine import group_attention, kernels
from adpo_jax.engine.decode_state import Prefixes, Sizes
from adpo_jax.engine.group_attention import Reach
from adpo_jax.engine.kernels import decode_gpu, decode_tpu
from adpo_jax.engine.kv_cache import CacheLayout, LayerKV
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model.attention import GLOBAL_WINDOW, LayerInfo

ROWS, K, Q, D, L = 5, 2, 3, 128, 2


def layout(dtype=jnp.float32):
    return CacheLayout(L, K, D, dtype, stacked=True, transposed_keys=False)


def stored(columns, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, L, ROWS, columns, K, D)).astype(np.float32)
    return jax.vmap(layout(dtype).pack)(k, v)


def queries(dtype=jnp.float32):
    q = np.random.default_rng(1).normal(size=(ROWS, K, Q, D)) / D**0.5
    return jnp.asarray(q, dtype)


def ring_reach(columns):
    """Slots of all ages, an idle one first, in a ring that has gone round."""
    age = np.array([-1, 0, 7, 45, columns - 1], np.int32)[:, None]
    return Reach(
        origin=jnp.full((ROWS, Q), 19, jnp.int32),
        back=jnp.broadcast_to(jnp.asarray(age), (ROWS, Q)),
        length=jnp.full((ROWS,), columns, jnp.int32),
        ring=True,
    )


def prefix_reach(columns):
    """Prefixes of all lengths, an empty one first, queries at different positions and windows."""
    length = jnp.array([0, 1, 33, columns - 1, columns], jnp.int32)
    origin = length[:, None] + jnp.array([0, 3, 20], jnp.int32)
    reach = jnp.where(jnp.arange(ROWS)[:, None] == 2, 25, group_attention.UNBOUNDED)
    return Reach(origin, jnp.broadcast_to(reach, (ROWS, Q)).astype(jnp.int32), length, ring=False)


REACHES = {"ring": ring_reach, "prefix": prefix_reach}
KERNELS = {"tpu": decode_tpu, "gpu": decode_gpu}


def normalised(part):
    """The output, and the log-sum-exp where anything is seen."""
    seen = part.top > -1e29
    out = jnp.where(seen[..., None], part.out / part.total[..., None], 0)
    return out, jnp.where(seen, part.top + jnp.log(part.total), 0)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("columns", [80, 96, 128])
@pytest.mark.parametrize("where", REACHES)
@pytest.mark.parametrize("machine", KERNELS)
def test_a_kernel_agrees_with_the_plain_version(machine, where, columns, soft_cap):
    kv, q, reach = stored(columns), queries(), REACHES[where](columns)
    plain = group_attention.attend_part(q, kv, 1, reach, soft_cap=soft_cap, transposed_keys=False)
    attend = functools.partial(
        KERNELS[machine].attend_part, soft_cap=soft_cap, interpret=True, block=32
    )
    fast = jax.jit(lambda q, kv, *arrays: attend(q, kv, 1, Reach(*arrays, ring=reach.ring)))(
        q, kv, *reach[:3]
    )
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


def paged(columns, dtype=jnp.float32, page=32):
    """The keys of `stored` in pages that lie in any order, with their table."""
    kv, N = stored(columns, dtype), columns // page
    order = np.random.default_rng(2).permutation(ROWS * N)

    def cut(x):  # [L, rows, K, columns, ...] -> [L, pages, K, page, ...]
        x = x.reshape(L, ROWS, K, N, page, *x.shape[4:])
        return x.swapaxes(2, 3).reshape(L, ROWS * N, K, page, *x.shape[5:])[:, order]

    return jax.tree.map(cut, kv), jnp.asarray(np.argsort(order).reshape(ROWS, N), jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize("machine", ["plain", *KERNELS])
def test_keys_in_pages_are_read_as_if_they_lay_side_by_side(machine, dtype):
    kv, q, reach = stored(128, dtype), queries(), prefix_reach(128)
    options = {"soft_cap": 2.0, "transposed_keys": False}
    wanted = group_attention.attend_part(q, kv, 1, reach, **options)
    pages, table = paged(128, dtype)
    if machine == "plain":
        found = group_attention.attend_part(q, pages, 1, reach, table, **options)
    elif machine == "gpu" and dtype == jnp.int8:
        pytest.skip("has no int8 cache")
    else:
        kernel = KERNELS[machine].attend_part
        found = kernel(q, pages, 1, reach, table, soft_cap=2.0, interpret=True)
    for a, b in zip(normalised(found), normalised(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_pages_that_no_row_sees_are_not_read():
    pages, table = paged(128)
    reach = Reach(
        *(jnp.full((ROWS, Q), x, jnp.int32) for x in (100, 20)), jnp.full(ROWS, 96), False
    )
    broken = jax.tree.map(
        lambda x: x.at[:, table[:, :2]].set(jnp.nan).at[:, table[:, 3]].set(jnp.nan), pages
    )
    for attend in (
        functools.partial(group_attention.attend_part, soft_cap=None, transposed_keys=False),
        functools.partial(decode_tpu.attend_part, interpret=True),
        functools.partial(decode_gpu.attend_part, interpret=True),
    ):
        whole, part = (attend(queries(), kv, 0, reach, table) for kv in (pages, broken))
        np.testing.assert_array_equal(part.out, whole.out)


def test_the_gpu_kernel_reads_a_layer_of_its_own_as_it_reads_a_stack():
    kv, q, reach = stored(96), queries(), ring_reach(96)
    apart = tuple(jax.tree.map(lambda x, i=i: x[i], kv) for i in range(L))
    parts = [decode_gpu.attend_part(q, x, 1, reach, interpret=True, block=32) for x in (kv, apart)]
    jax.tree.map(np.testing.assert_array_equal, *parts)


@pytest.mark.parametrize("where", REACHES)
def test_the_gpu_kernel_cuts_many_queries_into_programs(where, monkeypatch):
    monkeypatch.setattr(decode_gpu, "QUERY_NUMBERS", 1)
    kv, reach = stored(96), REACHES[where](96)
    q = jnp.concatenate([queries() + i / 64 for i in range(12)], axis=2)
    many = reach._replace(origin=jnp.tile(reach.origin, 12), back=jnp.tile(reach.back, 12))
    plain = group_attention.attend_part(q, kv, 1, many, soft_cap=None, transposed_keys=False)
    fast = decode_gpu.attend_part(q, kv, 1, many, interpret=True)
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=3e-5)


def test_a_program_of_the_gpu_kernel_fits_the_shared_memory_of_an_a100():
    assert decode_gpu.Cut.of(16, 128, 2) == (16, 64, 3)
    assert decode_gpu.Cut.of(128, 128, 2) == (128, 64, 3)
    assert decode_gpu.Cut.of(1000, 128, 2) == (128, 64, 3)
    assert decode_gpu.Cut.of(64, 256, 2) == (64, 32, 3)
    assert decode_gpu.Cut.of(64, 512, 2) == (32, 32, 2)
    assert decode_gpu.Cut.of(8, 512, 4) == (16, 32, 2)


def test_the_tpu_kernel_reads_an_int8_cache():
    kv, q, reach = stored(96, jnp.int8), queries(), ring_reach(96)
    plain = group_attention.attend_part(q, kv, 0, reach, soft_cap=None, transposed_keys=False)
    fast = decode_tpu.attend_part(q, kv, 0, reach, interpret=True, block=32)
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


def test_the_tpu_kernel_fetches_ahead_over_rows_and_programs():
    """Heads with eight queries each, 40 rows in six programs, idle rows among them."""
    rng = np.random.default_rng(3)
    rows, columns = 40, 96
    k, v = rng.normal(size=(2, 1, rows, columns, K, D)).astype(np.float32)
    kv = jax.vmap(layout().pack)(k, v)
    q = jnp.asarray(rng.normal(size=(rows, K, 8, D)) / D**0.5, jnp.float32)
    age = jnp.asarray(rng.integers(-1, columns, (rows, 1)), jnp.int32)
    reach = Reach(
        origin=jnp.full((rows, 8), 50, jnp.int32),
        back=jnp.broadcast_to(age, (rows, 8)),
        length=jnp.full((rows,), columns, jnp.int32),
        ring=True,
    )
    plain = group_attention.attend_part(q, kv, 0, reach, soft_cap=None, transposed_keys=False)
    fast = decode_tpu.attend_part(q, kv, 0, reach, interpret=True, block=32)
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


@pytest.mark.parametrize(
    ("columns", "dtype"), [(160, jnp.float32), (40, jnp.float32), (256, jnp.int8), (160, jnp.int8)]
)
@pytest.mark.parametrize("where", REACHES)
def test_the_tpu_kernel_reads_stores_of_any_length(where, columns, dtype):
    kv, q, reach = stored(columns, dtype), queries(), REACHES[where](columns)
    plain = group_attention.attend_part(q, kv, 1, reach, soft_cap=None, transposed_keys=False)
    fast = decode_tpu.attend_part(q, kv, 1, reach, interpret=True)
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


def test_a_sample_with_a_nan_spoils_no_other_in_the_tpu_kernel():
    """The first row alone sees more than one block, and those after it go through its buffers."""
    rows, columns = 80, 64
    k, v = np.random.default_rng(4).normal(size=(2, 1, rows, columns, 1, D)).astype(np.float32)
    v[0, 0, 60] = np.nan
    kv = jax.vmap(CacheLayout(1, 1, D, jnp.float32, True, False).pack)(k, v)
    age = jnp.where(jnp.arange(rows)[:, None] == 0, columns - 1, 3)
    length = jnp.full((rows,), columns, jnp.int32)
    reach = Reach(jnp.full((rows, 1), 10, jnp.int32), age.astype(jnp.int32), length, ring=True)
    q = jnp.ones((rows, 1, 1, D), jnp.float32)
    fast = decode_tpu.attend_part(q, kv, 0, reach, interpret=True, block=32)
    spoilt = np.isnan(fast.out).any(axis=(1, 2, 3))
    assert spoilt.nonzero()[0].tolist() == [0]


def test_a_block_of_the_tpu_kernel_is_whole_tiles_or_all_columns():
    assert decode_tpu.block_of(1024, 128, is_quantized=False) == 128
    assert decode_tpu.block_of(96, 128, is_quantized=False) == 96
    assert decode_tpu.block_of(160, 128, is_quantized=False) == 128
    assert decode_tpu.block_of(160, 128, is_quantized=True) == 160
    assert decode_tpu.block_of(500, 128, is_quantized=False) == 500
    assert decode_tpu.block_of(192, 128, is_quantized=False, is_page=True) == 192


def test_a_young_slot_needs_few_blocks():
    start, last = group_attention.block_range(ring_reach(128), 128, 32)
    assert start.tolist() == [0] * ROWS
    assert last.tolist() == [0, 0, 0, 1, 3]
    start, last = group_attention.block_range(prefix_reach(128), 128, 32)
    assert start.tolist() == [0, 0, 1, 3, 3]
    assert last.tolist() == [0, 0, 1, 3, 3]


@pytest.mark.parametrize("columns", [32, 96, 160, 224, 256])
def test_the_blocks_of_a_ring_are_those_with_columns_that_are_seen(columns):
    """Also where the last block is not a whole one; a slot that sees nothing needs a block too."""
    block, column, back = 64, *np.mgrid[0:columns, -1:columns]
    flat = [jnp.asarray(x.reshape(-1, 1), jnp.int32) for x in (column, back)]
    length = jnp.full(len(flat[0]), columns, jnp.int32)
    reach = Reach(*flat, length, ring=True)
    blocks = -(-columns // block)
    start, last = (np.asarray(x) for x in group_attention.block_range(reach, columns, block))
    behind = (start[:, None] - np.arange(blocks)) % blocks
    visited = np.zeros((len(start), blocks), bool)
    np.put_along_axis(visited, behind, np.arange(blocks) <= last[:, None], axis=1)
    seen = np.asarray(group_attention.columns_in_reach(reach, columns))[:, 0]
    needed = np.zeros_like(visited)
    for b in range(blocks):
        needed[:, b] = seen[:, b * block : (b + 1) * block].any(axis=1)
    assert not (needed & ~visited).any()
    # A ring that is seen nearly whole begins and ends in one block, which is visited once.
    assert (visited.sum(1) <= np.maximum(needed.sum(1), 1)).all()


def lowered_for(platform, attend, columns=256, dtype=jnp.bfloat16, pages=0):
    kv = jax.eval_shape(lambda: layout(dtype).zeros(ROWS, columns))
    q = jax.ShapeDtypeStruct((ROWS, K, Q, D), jnp.bfloat16)
    ints = jax.ShapeDtypeStruct((ROWS, Q), jnp.int32)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    tables = (jax.ShapeDtypeStruct((ROWS, pages), jnp.int32),) if pages else ()

    def f(q, kv, index, origin, reach, length, *tables):
        return attend(q, kv, index, Reach(origin, reach, length, not tables), *tables)

    arguments = (q, kv, jax.ShapeDtypeStruct((), jnp.int32), ints, ints, lengths, *tables)
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("pages", [0, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_the_tpu_kernel_lowers_for_a_tpu(dtype, pages):
    text = lowered_for("tpu", decode_tpu.attend_part, dtype=dtype, pages=pages).as_text()
    assert "tpu_custom_call" in text


# jax 0.12 deprecates Triton in Pallas; it has it still. Ends with the version that has it no more,
# where this kernel has to be one of Mosaic GPU.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("pages", [0, 3])
def test_the_gpu_kernel_lowers_for_cuda(pages):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered_for("cuda", decode_gpu.attend_part, pages=pages).as_text()
    assert "triton" in text


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_tpu_kernel_on_eight_devices_agrees_with_one(tensor):
    """With 4 tensor shards the 2 key/value heads are not split."""
    rows, columns = 8, 64
    rng = np.random.default_rng(3)
    k, v = rng.normal(size=(2, L, rows, columns, K, D)).astype(np.float32)
    kv = jax.vmap(layout().pack)(k, v)
    q = jnp.asarray(rng.normal(size=(rows, K, Q, D)), jnp.float32)
    age = jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.ones((1, Q), jnp.int32)
    reach = (jnp.full((rows, Q), 5, jnp.int32), age, jnp.full((rows,), columns, jnp.int32))
    mesh = make_mesh(data=1, fsdp=-1, tensor=tensor)

    def part(mesh):
        attend = kernels.attend_part("pallas_tpu_interpret", layout(), None, mesh)
        return jax.jit(lambda *arrays: attend(q, kv, 1, Reach(*arrays, ring=True)))(*reach)

    for ours, wanted in zip(normalised(part(mesh)), normalised(part(None))):
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_the_gpu_kernel_on_eight_devices_agrees_with_one_on_layers_of_their_own():
    rows, columns = 8, 64
    rng = np.random.default_rng(3)
    kv = tuple(
        LayerKV(*jnp.asarray(rng.normal(size=(2, rows, K, columns, D)), jnp.float32))
        for _ in range(L)
    )
    q = jnp.asarray(rng.normal(size=(rows, K, Q, D)), jnp.float32)
    age = jnp.arange(rows, dtype=jnp.int32)[:, None] * jnp.ones((1, Q), jnp.int32)
    reach = (jnp.full((rows, Q), 5, jnp.int32), age, jnp.full((rows,), columns, jnp.int32))

    def part(mesh):
        kernel = functools.partial(decode_gpu.attend_part, interpret=True)
        attend = kernels._of_each_device(kernel, mesh)
        return jax.jit(lambda *arrays: attend(q, kv, 1, Reach(*arrays, ring=True)))(*reach)

    for ours, wanted in zip(normalised(part(make_mesh(1, -1, 2))), normalised(part(None))):
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_the_prompts_of_idle_samples_and_of_nobody_are_not_read():
    """Slot 1 is idle, row 1 has one sample alone, row 2 none."""
    seen = []

    def attend(q, kv, index, reach):
        if not reach.ring:
            seen.append(np.asarray(reach.back))
        return group_attention.attend_part(
            q, kv, index, reach, soft_cap=None, transposed_keys=False
        )

    view = group_attention.View(
        position=jnp.array([9, 9, 9], jnp.int32),
        age=jnp.array([0, -1, 2], jnp.int32),
        column=jnp.int32(2),
        row=jnp.array([0, 0, 1], jnp.int32),
        rank=jnp.array([0, 1, 0], jnp.int32),
        slot=jnp.array([[0, 1], [2, 0], [0, 0]], jnp.int32),
        prefix_length=jnp.array([8, 8, 8], jnp.int32),
    )
    q = jnp.ones((3, K, D))
    ring, prefix = layout().zeros(3, 4), layout().zeros(3, 8)
    layer = LayerInfo(np.int32(0), np.int32(GLOBAL_WINDOW), np.int32(0))
    group_attention.group_attention(q, ring, prefix, layer, view, scale=1.0, attend=attend)
    everything = group_attention.UNBOUNDED
    assert seen[0].tolist() == [[everything, -1], [everything, -1], [-1, -1]]


@pytest.mark.parametrize("stacked", [True, False])
def test_a_gpu_puts_prompts_into_rows_as_others_do(stacked, monkeypatch):
    of_rows = CacheLayout(L, K, D, jnp.float32, stacked=stacked, transposed_keys=False)
    policy = Policy(tiny.model_config())
    verbs = Verbs(policy, of_rows)
    rng = np.random.default_rng(0)
    new = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), of_rows.zeros(3, 8)
    )
    # Rows beyond a batch repeat its last prompt, and go into the same row.
    new = jax.tree.map(
        lambda x: x.at[(*[slice(None)] * verbs.lead, 2)].set(x[(*[slice(None)] * verbs.lead, 1)]),
        new,
    )
    prefixes = Prefixes(new, jnp.array([8, 5, 5], jnp.int32))
    found = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr("adpo_jax.engine.verbs._platform", lambda _, name=platform: name)
        state = verbs.init_decode_state(Sizes(2, 4, rows=4, width=1, prefix=16))
        found.append(Verbs.insert.__wrapped__(verbs, state, prefixes, jnp.array([3, 0, 0])).prefix)
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert all(np.abs(x).max() > 1 for x in jax.tree.leaves(found[0].kv))
