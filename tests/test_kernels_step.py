"""A step of decoding in few kernels for GPUs, in Pallas' interpreter, against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adpo_jax import Policy
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine import kernels
from adpo_jax.engine.decode_state import Prefixes, Sizes
from adpo_jax.engine.kernels import decode_gpu
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model.layer_weights import LayerWeights
from adpo_jax.model.rope import Rope

MODELS = {
    "no norm": {},
    "a norm of heads": {"qk_norm": True},
    "windows, a cap and norms of 1 + weight": {
        "qk_norm": True,
        "norm_plus_one": True,
        "attention_soft_cap": 2.0,
        "windows": (None, 7),
        "num_heads": 6,
    },
    "keys of one head": {"num_heads": 20, "num_kv_heads": 1, "head_dim": 32},
}
SLOTS, COLUMNS, ROWS, WIDTH, PREFIX = 8, 160, 8, 3, 72


def state_of(verbs: Verbs, layout: CacheLayout):
    """Slots of all ages, an idle one among them, behind prompts of all lengths, an empty one too.

    Rows and slots of numbers that lie side by side are on one device of four.
    """
    rng = np.random.default_rng(0)

    def filled(kv):
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), kv)

    state = verbs.init_decode_state(Sizes(SLOTS, COLUMNS, ROWS, WIDTH, PREFIX))
    lengths = jnp.array([5, 9, 0, 9, PREFIX, 9, 33, 9], jnp.int32)
    generated = jnp.array([3, 120, 0, 159, 0, 11, 50, 60], jnp.int32)
    row = jnp.array([0, 0, 2, 2, 4, 4, 6, 6], jnp.int32)
    slots = state.slots._replace(
        token=jnp.arange(SLOTS, dtype=jnp.int32) + 3,
        position=lengths[row] + generated,
        generated=generated,
        active=jnp.arange(SLOTS) != 4,
        row=row,
        rank=jnp.array([0, 1, 0, 1, 0, 1, 0, 1], jnp.int32),
    )
    members = jnp.array([[0, 1, 0], [0] * 3, [2, 3, 99], [0] * 3] * 2, jnp.int32)
    members = members.at[4, :2].set(jnp.array([4, 5])).at[6, :2].set(jnp.array([6, 7]))
    return state._replace(
        ring=filled(state.ring),
        prefix=Prefixes(filled(state.prefix.kv), lengths),
        slots=slots,
        members=members,
        column=jnp.int32(7),
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tensor", [0, 2])
def test_a_step_in_few_kernels_equals_the_plain_one(model, tensor, monkeypatch):
    # Programs of 16 queries: those of one head are in several.
    monkeypatch.setattr(decode_gpu, "QUERY_NUMBERS", 1)
    config = tiny.model_config(**MODELS[model])
    mesh = make_mesh(data=1, fsdp=-1, tensor=tensor) if tensor else None
    policy = Policy(config, mesh=mesh)
    params = policy.init(jax.random.key(0))
    layout = CacheLayout(
        config.num_layers, config.num_kv_heads, config.head_dim, jnp.float32, False, False
    )
    verbs = Verbs(policy, layout)
    params, state = verbs.load_params(params), state_of(verbs, layout)

    def forward(params, state):
        return verbs._forward(params, state)[:2]

    def traced_anew(*args):  # else the second call would be the program of the first
        return jax.jit(lambda *args: forward(*args))(*args)

    hidden, ring = traced_anew(params, state)
    calls = []

    def attend_step(name, layout, policy):
        calls.append(name)
        return functools.partial(kernels._step_on_gpu, policy, interpret=True)

    monkeypatch.setattr(kernels, "attend_step", attend_step)
    found, found_ring = traced_anew(params, state)
    assert calls
    live = np.asarray(state.slots.active)
    np.testing.assert_allclose(found[live], hidden[live], rtol=2e-5, atol=2e-5)
    assert np.isfinite(found).all()
    for ours, wanted in zip(jax.tree.leaves(found_ring), jax.tree.leaves(ring)):
        np.testing.assert_allclose(ours[live], wanted[live], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_interleaved": True},
        {"qk_norm": True, "qk_norm_over_heads": True},
        {"qk_unit_norm": True},
        {"attention_sinks": True},
        {"ropes": (Rope(query_beta=0.1, query_length=8),)},
        {"ropes": (Rope(partial=0.5),)},
    ],
)
def test_heads_that_are_turned_in_another_way_take_the_plain_step(changes):
    for config, wanted in ((tiny.model_config(), True), (tiny.model_config(**changes), False)):
        weights = LayerWeights({}, config, jnp.bfloat16, None, 1.0)
        cos = np.zeros((1, 1, config.ropes[0].dimensions(config.head_dim) // 2))
        assert weights.turns_plainly(cos, config.head_dim) == wanted


def test_the_kernels_are_for_layers_in_a_tuple_and_sixteen_bits():
    config = tiny.model_config()
    apart = CacheLayout(2, 2, 16, jnp.bfloat16, stacked=False, transposed_keys=False)
    stack = CacheLayout(2, 2, 16, jnp.bfloat16, stacked=True, transposed_keys=False)
    of_16, of_32 = (Policy(config, dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert kernels.attend_step("pallas_gpu", apart, of_16)
    assert not kernels.attend_step("pallas_gpu", stack, of_16)
    assert not kernels.attend_step("pallas_gpu", apart, of_32)
    assert not kernels.attend_step("xla", apart, of_16)
