"""The kernels of decode attention against their plain version, and lowered for their machines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from adpo_jax import Policy, kernels, kv_cache, sharding
from adpo_jax.attention import LayerInfo
from adpo_jax.kernels import decode_gpu, decode_tpu
from adpo_jax.kv_cache import CacheLayout, Reach
from adpo_jax.model import ModelConfig
from adpo_jax.rope import Rope

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
    age = np.array([-1, 0, 7, 40, columns - 1], np.int32)[:, None]
    return Reach(
        origin=jnp.full((ROWS, Q), 19, jnp.int32),
        reach=jnp.broadcast_to(jnp.asarray(age), (ROWS, Q)),
        length=jnp.full((ROWS,), columns, jnp.int32),
        ring=True,
    )


def prefix_reach(columns):
    """Prefixes of all lengths, an empty one first, queries at different positions and windows."""
    length = jnp.array([0, 1, 33, columns - 1, columns], jnp.int32)
    origin = length[:, None] + jnp.array([0, 3, 20], jnp.int32)
    reach = jnp.where(jnp.arange(ROWS)[:, None] == 2, 25, kv_cache.UNBOUNDED)
    return Reach(origin, jnp.broadcast_to(reach, (ROWS, Q)).astype(jnp.int32), length, ring=False)


REACHES = {"ring": ring_reach, "prefix": prefix_reach}
KERNELS = {"tpu": decode_tpu, "gpu": decode_gpu}


def normalised(part):
    """The output, and the log-sum-exp where anything is seen."""
    seen = part.top > -1e29
    out = jnp.where(seen[..., None], part.out / part.total[..., None], 0)
    return out, jnp.where(seen, part.top + jnp.log(part.total), 0)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("columns", [96, 128])
@pytest.mark.parametrize("where", REACHES)
@pytest.mark.parametrize("machine", KERNELS)
def test_a_kernel_agrees_with_the_plain_version(machine, where, columns, soft_cap):
    kv, q, reach = stored(columns), queries(), REACHES[where](columns)
    plain = kv_cache.attend_part(q, kv, 1, reach, soft_cap=soft_cap, transposed_keys=False)
    attend = functools.partial(
        KERNELS[machine].attend_part, soft_cap=soft_cap, interpret=True, block=32
    )
    fast = jax.jit(lambda q, kv, *arrays: attend(q, kv, 1, Reach(*arrays, ring=reach.ring)))(
        q, kv, *reach[:3]
    )
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


def test_the_tpu_kernel_reads_an_int8_cache():
    kv, q, reach = stored(96, jnp.int8), queries(), ring_reach(96)
    plain = kv_cache.attend_part(q, kv, 0, reach, soft_cap=None, transposed_keys=False)
    fast = decode_tpu.attend_part(q, kv, 0, reach, interpret=True, block=32)
    for ours, wanted in zip(normalised(fast), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)


def test_a_young_slot_needs_few_blocks():
    start, last = decode_tpu.block_range(ring_reach(128), 128, 32)
    assert start.tolist() == [0] * ROWS
    assert last.tolist() == [0, 0, 0, 1, 3]
    start, last = decode_tpu.block_range(prefix_reach(128), 128, 32)
    assert start.tolist() == [0, 0, 1, 3, 3]
    assert last.tolist() == [0, 0, 1, 3, 3]


def lowered_for(platform, attend, columns=256, dtype=jnp.bfloat16):
    kv = jax.eval_shape(lambda: layout(dtype).zeros(ROWS, columns))
    q = jax.ShapeDtypeStruct((ROWS, K, Q, D), jnp.bfloat16)
    ints = jax.ShapeDtypeStruct((ROWS, Q), jnp.int32)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)

    def f(q, kv, index, origin, reach, length):
        return attend(q, kv, index, Reach(origin, reach, length, ring=True))

    arguments = (q, kv, jax.ShapeDtypeStruct((), jnp.int32), ints, ints, lengths)
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_the_tpu_kernel_lowers_for_a_tpu(dtype):
    text = lowered_for("tpu", decode_tpu.attend_part, dtype=dtype).as_text()
    assert "tpu_custom_call" in text


def test_the_gpu_kernel_lowers_for_cuda():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered_for("cuda", decode_gpu.attend_part).as_text()
    assert "triton" in text


def prefill_config(windows):
    return ModelConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=K,
        head_dim=D,
        windows=windows,
        ropes=(Rope(),),
        layer_ropes=(0, 0),
        attention_scale=D**-0.5,
        attention_soft_cap=5.0,
    )


def test_splash_prefill_agrees_with_plain_attention_in_every_layers_window():
    policy, T = Policy(prefill_config((40, None))), 128
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, n, D)), jnp.float32) for n in (4, K, K))
    lengths = np.array([[T], [70]])
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    segments = (positions < lengths).astype(jnp.int32)
    plain = policy.self_attention(positions, segments)
    splash = kernels.prefill_attention("pallas_tpu_interpret", policy, positions, segments)
    for index in range(2):
        layer = LayerInfo(*(jnp.asarray(leaf[index]) for leaf in policy.config.layer_info))
        for row, length in enumerate(lengths[:, 0]):
            ours, wanted = (a(q, k, v, layer, None)[0][row, :length] for a in (splash, plain))
            np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 1, 1), (1, 1, 4)])
def test_kernels_on_a_mesh_agree_with_the_plain_version(sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:4])
    kv = jax.tree.map(lambda x: jnp.concatenate([x[:, 1:], x[:, ::-1][:, :4]], axis=1), stored(96))
    q = jnp.concatenate([queries()[1:]] * 2)
    reach = Reach(*(jnp.concatenate([x[1:]] * 2) for x in ring_reach(96)[:3]), ring=True)
    plain = kv_cache.attend_part(q, kv, 1, reach, soft_cap=None, transposed_keys=False)
    attend = kernels.attend_part("pallas_tpu_interpret", layout(), None, mesh)
    split = jax.jit(lambda q, kv, *arrays: attend(q, kv, 1, Reach(*arrays, ring=True)))(
        q, kv, *reach[:3]
    )
    for ours, wanted in zip(normalised(split), normalised(plain)):
        np.testing.assert_allclose(ours, wanted, atol=2e-6)

    policy = Policy(prefill_config((40, None)), mesh=mesh)
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 128, n, D)), jnp.float32) for n in (4, K, K))
    positions = jnp.broadcast_to(jnp.arange(128, dtype=jnp.int32), (4, 128))
    plain = policy.self_attention(positions, jnp.ones_like(positions))
    splash = kernels.prefill_attention("pallas_tpu_interpret", policy, positions, positions)
    layer = LayerInfo(*(jnp.asarray(leaf[0]) for leaf in policy.config.layer_info))
    ours, wanted = (
        jax.jit(lambda *x, a=a: a(*x, layer, None)[0])(q, k, v) for a in (splash, plain)
    )
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_prefill_of_sizes_that_splash_cannot_take_is_plain():
    assert kernels.prefill_tpu.fits(prefill_config((None, None)), 256)
    assert not kernels.prefill_tpu.fits(prefill_config((None, None)), 64)


def test_a_kernel_that_cannot_run_is_refused():
    small = CacheLayout(L, K, 64, jnp.float32, stacked=True, transposed_keys=False)
    with pytest.raises(ValueError, match="multiple of 128; given 64"):
        kernels.resolve("pallas_tpu", small, "tpu")
    with pytest.raises(ValueError, match="no int8 cache"):
        kernels.resolve("pallas_gpu", layout(jnp.int8), "gpu")
    with pytest.raises(ValueError, match="attention is one of"):
        kernels.resolve("cuda", layout(), "gpu")
    assert kernels.resolve("auto", layout(), "cpu") == "xla"
    assert kernels.resolve("auto", layout(), "tpu") == "pallas_tpu"
