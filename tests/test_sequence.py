"""Packed streams whose queries several devices share, along the mesh axis `sequence`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_models import config_of
from test_ahead import MIXTURE
from test_kernels_stream import D, of_layer, stream_of, tensors
from test_lora import LORA
from test_packing import ALGORITHM, ragged, ragged_of, with_holes
from test_update import assert_same, step

from adpo_jax import Policy
from adpo_jax.devices import sharding
from adpo_jax.model import attention_kernels, tile_attention
from adpo_jax.model.attention import Places
from adpo_jax.model.attention_kernels import Settings, ring, stream_gpu, stream_mosaic
from adpo_jax.model.tile_attention import Stream
from adpo_jax.update.packing import Packing, pack

MESHES = {
    "alone": {"fsdp": 1, "sequence": 8},
    "beside others": {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2},
    "beside experts": {"fsdp": 2, "sequence": 2, "expert": 2},
    "replicas of experts": {"data": 2, "fsdp": 1, "sequence": 2, "expert": 2},
}


def adapted_with_windows() -> tuple[Policy, dict]:
    """A window and a soft cap, and adapters that are no longer 0."""
    config = tiny.model_config(windows=(None, 4), attention_soft_cap=1.5)
    policy = Policy(config)
    policy, params = policy.with_adapters(policy.init(jax.random.key(0)), LORA, jax.random.key(1))

    def moved(x):
        return x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    return policy, jax.tree.map(moved, params)


def mixture() -> tuple[Policy, dict]:
    return Policy.from_config(MIXTURE, jax.random.key(0))


POLICIES = {
    "whole": tiny.policy_and_params,
    "adapters, windows": adapted_with_windows,
    "mixture": mixture,
}


@functools.cache
def on_one_device(kind: str):
    batch, rewards = with_holes()
    packed = pack(ragged_of(batch, True), tile=4)
    return step(*POLICIES[kind](), packed, rewards, algorithm=ALGORITHM)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("whole", "alone"),
        ("adapters, windows", "alone"),
        ("adapters, windows", "beside others"),
        ("mixture", "beside experts"),
        ("mixture", "replicas of experts"),
    ],
)
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_devices_that_share_streams_take_the_step_of_one_device(kind, axes, exchange):
    """With shared prompts and holes in what is trained on."""
    mesh = sharding.make_mesh(**MESHES[axes])
    policy, params = POLICIES[kind]()
    policy = dataclasses.replace(
        policy, mesh=mesh, gradient_checkpointing="save_dots", sequence_exchange=exchange
    )
    spread = sharding.BatchSharding(mesh)
    batch, rewards = with_holes()
    packed = pack(
        ragged_of(batch, True),
        num_shards=spread.num_shards,
        shares=spread.num_shares,
        completions_per_micro=5,
        tile=4,
    )
    assert packed.num_micro_B[0] > 1
    params = jax.device_put(params, policy.shardings(policy.abstract_params()))
    found = step(policy, params, packed, rewards, algorithm=ALGORITHM, put=spread.put)
    # Those of routers are means over micro-batches, and one device has one.
    for _, metrics in (found, wanted := on_one_device(kind)):
        for name in [name for name in metrics if name.startswith("router/")]:
            metrics.pop(name)
    assert_same(wanted, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", ["xla", "pallas_tpu_interpret", "pallas_gpu"])
def test_shares_of_queries_attend_to_the_keys_of_all(name, exchange):
    stream, (q, k, v, weight) = stream_of(), tensors(4, 2)
    whole = Settings((None, 11), 2, D, D**-0.5, 3.0, jnp.float32, None)
    mesh = sharding.make_mesh(data=2, fsdp=1, sequence=4)
    shared = whole._replace(mesh=mesh, exchange=exchange)
    real = (stream.segments > 0)[..., None, None]

    sinks = None if "tpu" in name else jnp.asarray([0.3, -1.0, 2.0, 0.0])

    def both(name, settings, layer):
        if name == "pallas_gpu":
            attend = attention_kernels._gpu_stream(settings, stream, interpret=True)
        else:
            attend = attention_kernels.stream_attention(name, settings, stream)

        def loss(q, k, v, sinks):
            out = jnp.where(real, attend(q, k, v, layer._replace(sinks=sinks), None)[0], 0)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)

    (_, out), gradients = both(name, shared, of_layer(11))
    (_, wanted), wanted_gradients = both("xla", whole, of_layer(11))
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients)):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("lengths", [{"mean": 120.0}, {"P": 2, "G": 4, "T": 8000, "mean": 3000.0}])
def test_shares_see_equally_many_key_tiles_and_every_token_has_one_place(lengths):
    sequences, rng = ragged(**lengths), np.random.default_rng(0)
    for group in sequences.completions:
        for g, completion in enumerate(group):
            tokens = rng.integers(1, 1 << 30, len(completion)).astype(np.int32)
            group[g] = dataclasses.replace(completion, tokens=tokens)
    cut = {"completions_per_micro": 32, "full_length": 512} if "P" not in lengths else {}
    packing_of = Packing(sequences, **cut, shares=8)
    assert packing_of.load_imbalance < 1.1
    packed = packing_of.batch(sequences)
    for group, wanted in zip(packing_of.unpacked(packed.micro.targets), sequences.completions):
        for targets, completion in zip(group, wanted, strict=True):
            np.testing.assert_array_equal(targets, completion.tokens)
    assert packed.trained.sum() == sequences.lengths.sum()
    # A place of a completion predicts what the place holds that the log-probs are taken from.
    segments = packed.of_completions(packed.micro.segments[:, 0])
    np.testing.assert_array_equal(segments > 0, packed.micro.targets[:, 0] > 0)
    # Those of a tile see what they saw before the tiles were dealt out.
    plain = Packing(sequences, **cut, size=packing_of.size).batch(sequences)
    before, after = (_seen(batch) for batch in (plain, packed))
    assert before == after


def test_every_turn_of_a_ring_gives_all_devices_about_as_much_to_do():
    """Two completions with tiles on devices of their own would each wait for half the turns."""
    sequences = ragged(P=1, G=2, T=12000, mean=9000.0)
    packed = Packing(sequences, shares=8).batch(sequences)
    (key_tiles,) = packed.micro.key_tiles[0]
    share = len(key_tiles) // 8
    seen = np.zeros((8, 8), int)
    for query, tiles in enumerate(key_tiles):
        np.add.at(seen[query // share], (tiles[tiles > 0] - 1) // share, 1)
    devices = np.arange(8)
    busiest = sum(seen[devices, (devices - turn) % 8].max() for turn in range(8))
    assert busiest < 1.2 * seen.sum() / 8


def _seen(batch) -> set:
    """For each tile of queries, its first token and those of the tiles that it sees."""
    found = set()
    for micro in range(batch.num_micro_B[0]):
        streams = jax.tree.map(lambda x: x[0, micro], batch.micro)  # noqa: B023
        n = len(streams.key_tiles)
        firsts = (x.reshape(n, -1)[:, 0].tolist() for x in (streams.segments, streams.positions))
        names = list(zip(*firsts))
        for name, tiles in zip(names, streams.key_tiles):
            found.add((micro, name, frozenset(names[t - 1] for t in tiles if t)))
    return found


def test_linear_attention_runs_through_a_stream_on_one_device():
    mesh = sharding.make_mesh(fsdp=4, sequence=2)
    with pytest.raises(ValueError, match=r"mesh.sequence is 2.* give the devices to mesh.fsdp"):
        Policy.abstract_from_config(config_of("qwen3_next"), mesh=mesh)


def test_the_passes_over_parts_of_the_keys_add_up_for_the_kernels_of_hopper_cards():
    """As a ring adds them up, here on one device. Some tiles see nothing of a part."""
    tile, lengths = 64, (70, 100, 30)
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    positions = np.concatenate([range(70), range(70, 170), range(70, 100)])[None]
    segments, positions = (np.pad(x, ((0, 0), (0, 56))) for x in (segments, positions))
    prompts, n = np.where(segments > 0, 1, 0).astype(np.int32), segments.shape[1] // tile
    key_tiles = np.where(np.tri(n, dtype=bool), np.arange(n), -1).astype(np.int32)[None]
    stream = Stream(*map(jnp.asarray, (positions.astype(np.int32), segments, prompts, key_tiles)))
    rng = np.random.default_rng(0)
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(1, segments.shape[1], heads, D)), jnp.float32)
        for heads in (2, 1, 1, 2)
    )
    settings = {"scale": D**-0.5, "windows": False, "interpret": True}
    passes = ring.Passes(
        functools.partial(stream_mosaic.forward, **settings),
        functools.partial(stream_mosaic.gradients, **settings),
    )
    weight = jnp.where((segments > 0)[..., None, None], weight, 0)
    lists_of = functools.partial(stream_gpu.lists_of, windows=False)
    whole = stream._replace(keys=Places(stream.positions, stream.segments))
    parts = ring.Parts(whole, *ring.parts_of(whole, 2, lists_of))
    assert (np.asarray(parts.key_tiles)[0, 1, :2] == -1).all()

    def in_parts():
        halves = [(k[:, at], v[:, at]) for at in (slice(0, 128), slice(128, 256))]
        found = [passes.forward(q, *kv, of_layer(), *parts.of(i)) for i, kv in enumerate(halves)]
        saved = ring._added(*found)
        grads = [
            passes.gradients(q, *kv, of_layer(), *parts.of(i), saved, weight)
            for i, kv in enumerate(halves)
        ]
        (d_q, *first), (more, *second) = grads
        d_k, d_v = (jnp.concatenate(pair, axis=1) for pair in zip(first, second))
        return saved.out, d_q + more, d_k, d_v

    def plain():
        attend = tile_attention.stream_attention(stream, scale=D**-0.5)
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, of_layer(), None)[0], q, k, v)
        return out, *pull(weight)

    real = (segments > 0)[..., None, None]
    (out, *grads), (wanted, *wanted_grads) = jax.jit(in_parts)(), jax.jit(plain)()
    np.testing.assert_allclose(jnp.where(real, out, 0), jnp.where(real, wanted, 0), atol=2e-5)
    for ours, theirs in zip(grads, wanted_grads):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
