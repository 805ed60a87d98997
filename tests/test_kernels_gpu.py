"""Small kernels for GPUs against the plain functions, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adpo_jax.devices import topologies
from adpo_jax.engine.group_attention import Reach
from adpo_jax.engine.kernels import decode_gpu
from adpo_jax.engine.kv_cache import LayerKV
from adpo_jax.model import gated_gpu, grouped, head_gpu, layers, norm_rope_gpu, rope
from adpo_jax.model.layers import rms_norm
from adpo_jax.model.model_config import ClampedGate


@pytest.mark.parametrize(
    ("normed", "plus_one", "shape"),
    [(True, False, (2, 6, 3, 64)), (True, True, (1, 8, 8, 32)), (False, False, (1, 5, 4, 128))],
)
def test_the_kernel_of_norm_and_rotation_equals_the_plain_functions(normed, plus_one, shape):
    _, T, _, D = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    weight = jax.random.normal(keys[2], (D,)) if normed else None
    positions = jnp.broadcast_to(3 * jnp.arange(T), shape[:2])
    cos, sin = (table[0] for table in rope.cos_sin((rope.Rope(),), D, positions))

    def plain(x, weight):
        normed = x if weight is None else rms_norm(x, weight, 1e-6, plus_one)
        return rope.rotate(normed, cos, sin)

    def kernel(x, weight):
        settings = {"eps": 1e-6, "plus_one": plus_one, "interpret": True}
        return norm_rope_gpu.norm_and_rotate(x, weight, cos, sin, **settings)

    wanted, found = (jax.vjp(f, x, weight) for f in (plain, kernel))
    np.testing.assert_array_equal(wanted[0], found[0])
    (wanted_x, wanted_w), (found_x, found_w) = wanted[1](g), found[1](g)
    np.testing.assert_allclose(*(np.float32(y) for y in (wanted_x, found_x)), rtol=1e-2, atol=1e-4)
    if normed:
        np.testing.assert_allclose(wanted_w, found_w, rtol=1e-5, atol=1e-5)


def test_heads_that_the_kernel_does_not_take_are_told():
    assert norm_rope_gpu.runs(jnp.bfloat16, 128)
    assert not norm_rope_gpu.runs(jnp.float32, 128)
    assert not norm_rope_gpu.runs(jnp.bfloat16, 96)


@pytest.mark.parametrize("activation", gated_gpu.LOWERED)
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 5, gated_gpu.BLOCK)])
def test_one_pass_gives_both_gradients_of_a_gated_activation(activation, shape):
    keys = jax.random.split(jax.random.key(0), 3)
    gate, up, g = (2 * jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    exact = [x.astype(jnp.float32) for x in (gate, up)]
    out, pull = jax.vjp(lambda *x: gated_gpu.gated(activation, *x, True), gate, up)
    np.testing.assert_array_equal(out, layers.gated(activation, gate, up))
    wanted = jax.vjp(lambda *x: layers.gated(activation, *x), *exact)[1](g.astype(jnp.float32))
    for found, plain in zip(pull(g), wanted):
        np.testing.assert_allclose(np.float32(found), plain, rtol=2**-7, atol=1e-4)


def test_a_gate_that_the_kernel_does_not_take_is_told():
    assert gated_gpu.runs("silu", jnp.bfloat16, 100)
    assert not gated_gpu.runs("silu", jnp.float32, 100)
    assert not gated_gpu.runs("silu", jnp.bfloat16, 131_072 * 17_408)
    assert not gated_gpu.runs("gelu", jnp.bfloat16, 100)
    assert not gated_gpu.runs(ClampedGate(1.7, 7.0), jnp.bfloat16, 100)


@pytest.mark.parametrize("V", [100, 3 * head_gpu.BLOCK - 7])
def test_one_pass_over_the_logits_gives_the_partition_function_and_the_mean(V):
    logits = 5 * jax.random.normal(jax.random.key(0), (3, V)) - 40.0
    log_z, mean = head_gpu.log_z_and_mean(logits, interpret=True)
    np.testing.assert_allclose(log_z, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
    wanted = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    np.testing.assert_allclose(mean, wanted, rtol=1e-6)


def gradient_for_an_h100(total, *shapes) -> str:
    """The compiled program of a sum and its gradient by the first two arguments."""
    if not topologies.has_gpu_compiler():
        pytest.skip("needs the extra [gpu-aot]")
    devices = topologies.topology_devices("h100:1")
    here = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    given = [jax.ShapeDtypeStruct(*shape, sharding=here) for shape in shapes]
    traced = jax.jit(jax.value_and_grad(total, (0, 1))).trace(*given)
    return topologies.lowered(traced, devices[0]).compile().as_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_the_small_kernels_compile_for_an_h100():
    def total(x, weight, cos, logits):
        heads = norm_rope_gpu.norm_and_rotate(x, weight, cos, cos)
        opened = gated_gpu.gated("silu", heads, x) + gated_gpu.gated("gelu_tanh", x, heads)
        return jnp.sum(opened.astype(jnp.float32)) + jnp.sum(head_gpu.log_z_and_mean(logits)[1])

    shapes = {(2, 6, 3, 64): jnp.bfloat16, (64,): jnp.float32, (2, 6, 32): jnp.float32}
    shapes |= {(3, 5000): jnp.float32}
    text = gradient_for_an_h100(total, *shapes.items())
    assert all(name in text for name in ("norm_rope_gradient", "gated_gradient", "head_sums"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_decoding_with_wide_heads_compiles_for_a_gpu():
    """For an A100, whose cores have the least shared memory; Gemma 4 has heads of 512."""
    if not topologies.has_gpu_compiler():
        pytest.skip("needs the extra [gpu-aot]")
    (card,) = topologies.topology_devices("a100:1")
    here = NamedSharding(Mesh(np.array([card]), ("x",)), PartitionSpec())

    def given(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    rows, K, Q, D, columns = 4, 2, 64, 512, 256

    def attend(q, kv, origin, back, length):
        reach = Reach(origin, back, length, ring=False)
        return decode_gpu.attend_part(q, kv, 0, reach)

    store = given(1, rows, K, columns, D)
    ints = given(rows, Q, dtype=jnp.int32)
    arguments = (given(rows, K, Q, D), LayerKV(store, store), ints, ints)
    traced = jax.jit(attend).trace(*arguments, given(rows, dtype=jnp.int32))
    assert "decode_prompts" in topologies.lowered(traced, card).compile().as_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_products_of_experts_compile_for_an_h100_and_multiply_no_row_by_all_matrices():
    def total(x, w, sizes):
        return jnp.sum(grouped.product(None, x, w, None, sizes).astype(jnp.float32))

    shapes = ((200, 128), jnp.bfloat16), ((8, 128, 64), jnp.bfloat16), ((8,), jnp.int32)
    text = gradient_for_an_h100(total, *shapes)
    assert all(name in text for name in ("grouped_product", "grouped_outer"))
    assert " dot(" not in text
    assert "gemm" not in text
