"""The kernel of attention over packed streams against its plain version, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adpo_jax.devices import topologies
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.model import attention_choice, attention_kernels
from adpo_jax.model.attention import (
    GLOBAL_WINDOW,
    LayerInfo,
    dot_product_attention,
    self_attention,
    visible,
)
from adpo_jax.model.attention_choice import AttentionFallback
from adpo_jax.model.attention_kernels import Settings, stream_gpu, stream_mosaic, stream_tpu
from adpo_jax.model.attention_kernels.mosaic import pieces
from adpo_jax.model.tile_attention import Stream, stream_attention

B, W, D = 2, 16, 128
# (prompt tokens, completion tokens...) of the groups of each stream.
STREAMS = [[(20, 30, 9), (3, 17, 40)], [(40, 8, 8, 20)]]


def stream_of(tile: int = W, tokens: int = 128) -> Stream:
    """Prompts, then completions, and padding; each tile lists those that its segments lie in."""
    rows = []
    for groups in STREAMS:
        position, segment, prompt = [], [], []
        for g, (length, *_) in enumerate(groups):
            position += range(length)
            segment += [g + 1] * length
            prompt += [g + 1] * length
        for g, (length, *completions) in enumerate(groups):
            for completion in completions:
                position += range(length, length + completion)
                segment += [max(segment) + 1] * completion
                prompt += [g + 1] * completion
        padding = [0] * (tokens - len(position))
        rows.append([x + padding for x in (position, segment, prompt)])
    positions, segments, prompts = np.swapaxes(np.array(rows, np.int32), 0, 1)
    n = tokens // tile
    lists = np.full((len(rows), n, n), -1, np.int32)
    for b in range(len(rows)):
        tiles = segments[b].reshape(n, tile)
        for i in range(n):
            wanted = set(tiles[i]) | set(prompts[b].reshape(n, tile)[i])
            listed = [t for t in range(i + 1) if wanted & (set(tiles[t]) - {0})]
            lists[b, i, : len(listed)] = listed
    longest = (lists >= 0).sum(-1).max()
    return Stream(positions, segments, prompts, lists[..., :longest])


def of_layer(window=GLOBAL_WINDOW):
    return LayerInfo(np.int32(0), np.int32(window), np.int32(0))


def tensors(heads, kv_heads, tokens=128, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(B, tokens, n, D) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@pytest.mark.parametrize(
    ("machine", "heads", "kv_heads", "soft_cap", "window"),
    [
        (stream_tpu, 2, 2, None, GLOBAL_WINDOW),
        (stream_tpu, 4, 2, 3.0, GLOBAL_WINDOW),
        (stream_tpu, 2, 1, None, 11),
        ("far", 4, 2, 3.0, 11),
        (stream_gpu, 4, 2, 3.0, GLOBAL_WINDOW),
        (stream_gpu, 2, 1, None, 11),
    ],
)
def test_the_kernel_and_its_gradients_agree_with_the_plain_version(
    machine, heads, kv_heads, soft_cap, window, monkeypatch
):
    if machine == "far":  # a side that lies in the device's memory
        monkeypatch.setattr(stream_tpu, "VMEM_BYTES", 0)
        machine = stream_tpu
    stream, (q, k, v, weight) = stream_of(), tensors(heads, kv_heads)
    settings = {"scale": D**-0.5, "soft_cap": soft_cap}
    real = jnp.asarray(stream.segments > 0)[..., None, None]

    def loss(attend, q, k, v):
        out = attend(q, k, v)
        return jnp.sum(jnp.where(real, out * weight, 0)), jnp.where(real, out, 0)

    def both(attend):
        value = jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True)
        return jax.jit(value)(q, k, v)

    attention = stream_attention(stream, windows=True, **settings)
    (_, plain), plain_grads = both(lambda q, k, v: attention(q, k, v, of_layer(window), None)[0])
    kernel = functools.partial(machine.attend, interpret=True, **settings)
    (_, fast), fast_grads = both(lambda q, k, v: kernel(q, k, v, of_layer(window), stream))
    np.testing.assert_allclose(fast, plain, atol=1e-5)
    for ours, wanted in zip(fast_grads, plain_grads):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("machine", "lengths", "tile", "heads", "windows"),
    [
        (stream_gpu, (40, 75, 70), 32, (4, 2), False),
        (stream_gpu, (40, 75, 70), 32, (4, 2), True),
        # Two last tiles of padding alone, and one thread block takes all pieces.
        (stream_mosaic, (64, 100, 20), 64, (2, 1), False),
        (stream_mosaic, (60, 70, 50), 64, (3, 1), True),
        pytest.param(stream_mosaic, (130, 260, 40), 128, (4, 1), False, marks=pytest.mark.long),
        pytest.param(stream_mosaic, (60, 70, 50), 64, (4, 1), True, marks=pytest.mark.long),
    ],
)
def test_the_gpu_kernels_walk_tiles_in_blocks_and_their_queries_in_chunks(
    machine, lengths, tile, heads, windows, monkeypatch
):
    """Long completions, so that some tiles need no mask, and a prompt that many tiles see."""
    monkeypatch.setattr(stream_gpu, "CHUNK", 3 if machine is stream_gpu else 2)
    monkeypatch.setattr(pieces, "AT_ONCE", 1)
    for name in ("FORWARD", "OF_QUERIES", "OF_KEYS"):
        monkeypatch.setattr(stream_gpu, name, stream_gpu.Shape(16, 32, 4, 2))
    segments = np.concatenate([[g + 1] * n for g, n in enumerate(lengths)])[None].astype(np.int32)
    first = lengths[0]
    positions = np.concatenate([range(first), *(range(first, first + n) for n in lengths[1:])])[
        None
    ]
    pad = -segments.shape[1] % tile + 2 * tile * (machine is stream_mosaic)
    segments, positions = (np.pad(x, ((0, 0), (0, pad))) for x in (segments, positions))
    prompts = np.where(segments > 0, 1, 0).astype(np.int32)
    n = segments.shape[1] // tile
    key_tiles = np.where(np.tri(n, dtype=bool), np.arange(n), -1).astype(np.int32)[None]
    key_tiles[0, ~segments.reshape(n, tile).any(axis=1)] = -1
    stream = Stream(*map(jnp.asarray, (positions.astype(np.int32), segments, prompts, key_tiles)))
    lists = stream_gpu.lists_of(stream, windows=windows)
    assert (np.asarray(lists.key_counts)[..., 0].max() > 0) != windows
    assert np.asarray(lists.sums)[..., 1].max() > 1

    rng = np.random.default_rng(0)
    N, (H, K) = segments.shape[1], heads
    settings = {"scale": D**-0.5, "soft_cap": 3.0 if windows else None}
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(1, N, h, D)), jnp.float32) for h in (H, K, K, H)
    )
    layer = of_layer(50 if windows else GLOBAL_WINDOW)
    real = (segments > 0)[..., None, None]

    def both(attend):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layer), q, k, v)
        return jnp.where(real, out, 0), *pull(jnp.where(real, weight, 0))

    plain = stream_attention(stream, windows=windows, **settings)
    wanted = jax.jit(lambda: both(lambda *a: plain(*a, None)[0]))()
    kernel = functools.partial(machine.attend, windows=windows, interpret=True, **settings)
    found = jax.jit(lambda: both(lambda *a: kernel(*a, stream, lists)))()
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_gpu_kernel_runs_rows_as_streams():
    """Rows know no prompts: each segment sees itself."""
    stream, (q, k, v, _) = stream_of(), tensors(4, 2)
    rows = (stream.positions[:, :90], stream.segments[:, :90])
    q, k, v, real = q[:, :90], k[:, :90], v[:, :90], (rows[1] > 0)[..., None, None]
    settings = Settings((None,), 2, D, D**-0.5, None, jnp.float32, None)
    plain = self_attention(*rows, **settings.plain)(q, k, v, of_layer(), None)[0]
    attend = attention_kernels._gpu_rows(settings, *rows, interpret=True)
    fast = jax.jit(lambda *qkv: attend(*qkv, of_layer(), None)[0])(q, k, v)
    np.testing.assert_allclose(np.where(real, fast, 0), np.where(real, plain, 0), atol=1e-5)
    assert "tiles of a multiple of 16 tokens; given 8" in stream_gpu.limit(64, 8)
    assert "tiles of a multiple of 64 tokens; given 32" in stream_mosaic.limit(64, 2)
    assert stream_mosaic.rows_as_stream(*rows).tile == 128
    assert stream_mosaic.rows_as_stream(*(x[:, :20] for x in rows)).tile == 64


@pytest.mark.parametrize("tiles_at_once", [1, 2, 4])  # of 9: even, padded, fewer than allowed
def test_tiles_in_turn_agree_with_all_at_once(tiles_at_once):
    stream, (q, k, v, weight) = stream_of(tokens=144), tensors(4, 2, tokens=144)
    real = jnp.asarray(stream.segments > 0)[..., None, None]
    J = stream.key_tiles.shape[-1]
    tile_bytes = 4 * B * 4 * W * J * W

    @functools.partial(jax.jit, static_argnums=0)
    def both(score_bytes, q, k, v):
        attend = stream_attention(
            stream,
            scale=D**-0.5,
            soft_cap=3.0,
            score_bytes=score_bytes,
            # Gradients of keys are added up in a loop too, and masks are made with the scores.
            tile_by_tile=score_bytes == tile_bytes,
            mask_bytes=0 if score_bytes == tile_bytes else 2**20,
        )
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, of_layer(), None)[0], q, k, v)
        return jnp.where(real, out, 0), pull(jnp.where(real, weight, 0))

    at_once, in_turn = both(9 * tile_bytes, q, k, v), both(tiles_at_once * tile_bytes, q, k, v)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, in_turn, at_once)
    text = both.lower(tiles_at_once * tile_bytes, q, k, v).as_text()
    assert "while" in text
    assert "while" not in both.lower(9 * tile_bytes, q, k, v).as_text()


def test_streams_side_by_side_on_devices_agree_with_the_plain_version():
    stream, (q, k, v, _) = stream_of(), tensors(4, 2)
    settings = Settings((None,), 2, D, D**-0.5, None, jnp.float32, None)
    sharded = settings._replace(mesh=make_mesh(data=B, fsdp=1, tensor=4))

    def out(name, settings):
        attend = attention_kernels.stream_attention(name, settings, stream)
        return jax.jit(lambda *qkv: attend(*qkv, of_layer(), None)[0])(q, k, v)

    real = (stream.segments > 0)[..., None, None]
    plain, fast = out("xla", settings), out("pallas_tpu_interpret", sharded)
    np.testing.assert_allclose(np.where(real, fast, 0), np.where(real, plain, 0), atol=1e-5)
    # The mask that cudnn would be given.
    mask = visible(*stream.tokens.pairs(), np.int32(GLOBAL_WINDOW))
    dense = dot_product_attention(q, k, v, mask, scale=D**-0.5)
    np.testing.assert_allclose(np.where(real, dense, 0), np.where(real, plain, 0), atol=1e-5)


def test_the_lists_of_queries_are_the_lists_of_keys_turned_round():
    stream = stream_of()
    tiles, counts = jax.tree.map(np.asarray, stream_tpu.query_lists(stream.key_tiles, 8))
    n = tiles.shape[1]
    for b in range(B):
        for key in range(n):
            sees = [i for i in range(n) if key in stream.key_tiles[b, i]]
            assert tiles[b, key, : counts[b, key]].tolist() == sees


def gradient(q, k, v, stream, kernels=stream_tpu):
    def loss(q, k, v):
        out = kernels.attend(q, k, v, of_layer(), stream, scale=D**-0.5)
        return out.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


def shapes(tokens, tile, listed, heads, kv_heads, streams=1):
    ints = jax.ShapeDtypeStruct((streams, tokens), jnp.int32)
    stream = Stream(*[ints] * 3, jax.ShapeDtypeStruct((streams, tokens // tile, listed), jnp.int32))
    q, k = (jax.ShapeDtypeStruct((streams, tokens, n, D), jnp.bfloat16) for n in (heads, kv_heads))
    return q, k, k, stream


def test_forward_and_backward_lower_for_a_tpu():
    lowered = jax.jit(gradient).trace(*shapes(512, 64, 4, 4, 2)).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") >= 3


@pytest.mark.slow
def test_the_kernels_of_hopper_cards_compile_for_an_h100():
    if not topologies.has_gpu_compiler():
        pytest.skip("needs the extra [gpu-aot]")
    (device,) = topologies.topology_devices("h100:1")
    gradient_of = functools.partial(gradient, kernels=stream_mosaic)
    there = jax.jit(gradient_of, in_shardings=jax.sharding.SingleDeviceSharding(device))
    program = topologies.lowered(there.trace(*shapes(512, 64, 4, 4, 2)), device).compile()
    calls = [line for line in program.as_text().splitlines() if "custom-call" in line]
    assert sum("mosaic_gpu" in line for line in calls) >= 3


def test_streams_that_do_not_fit_are_known():
    assert stream_tpu.is_near(12288, 128, 2)
    assert not stream_tpu.is_near(12289, 128, 2)
    assert stream_tpu.limit(256, 512) == ""
    assert "given 257 tiles of queries that may see 512" in stream_tpu.limit(257, 512)


def test_a_stream_too_long_for_the_kernel_runs_plain_with_one_warning(monkeypatch):
    monkeypatch.setattr(stream_tpu, "MAX_LISTED", 63)
    attention_choice._warn_once.cache_clear()
    stream, (q, k, v, _) = stream_of(), tensors(4, 2)
    settings = Settings((None,), 2, D, D**-0.5, None, jnp.float32, None)

    def out(name):
        attend = attention_kernels.stream_attention(name, settings, stream)
        return attend(q, k, v, of_layer(), None)[0]

    message = "'pallas_tpu_interpret' of packed streams holds lists of 63 tiles .* given 8 tiles"
    with pytest.warns(AttentionFallback, match=message) as warned:
        fallen_back = [out("pallas_tpu_interpret") for _ in range(2)]
    assert len(warned) == 1
    np.testing.assert_array_equal(fallen_back[1], out("xla"))
