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
from adpo_jax.model import attention_kernels
from adpo_jax.model.attention_kernels import Settings
from adpo_jax.update.packing import Packing, pack

MESHES = {
    "alone": {"fsdp": 1, "sequence": 8},
    "beside others": {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2},
    "beside experts": {"fsdp": 2, "sequence": 2, "expert": 2},
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
    ],
)
def test_devices_that_share_streams_take_the_step_of_one_device(kind, axes):
    """With shared prompts and holes in what is trained on."""
    mesh = sharding.make_mesh(**MESHES[axes])
    policy, params = POLICIES[kind]()
    policy = dataclasses.replace(policy, mesh=mesh, gradient_checkpointing="save_dots")
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


@pytest.mark.parametrize("name", ["xla", "pallas_tpu_interpret", "pallas_gpu"])
def test_shares_of_queries_attend_to_the_keys_of_all(name):
    stream, (q, k, v, weight) = stream_of(), tensors(4, 2)
    whole = Settings((None, 11), 2, D, D**-0.5, 3.0, jnp.float32, None)
    shared = whole._replace(mesh=sharding.make_mesh(data=2, fsdp=1, sequence=4))
    real = (stream.segments > 0)[..., None, None]

    def both(name, settings, window):
        if name == "pallas_gpu":
            attend = attention_kernels._gpu_stream(settings, stream, interpret=True)
        else:
            attend = attention_kernels.stream_attention(name, settings, stream)

        def loss(q, k, v):
            out = jnp.where(real, attend(q, k, v, of_layer(window), None)[0], 0)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), gradients = both(name, shared, 11)
    (_, wanted), wanted_gradients = both("xla", whole, 11)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    for ours, theirs in zip(gradients, wanted_gradients):
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
