"""The policy against transformers' logits, and against itself: padding, cache, mesh, dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import FAMILIES, GOLDEN, VARIANTS, arrays, config_of, model

from adpo_jax import Policy, SamplingParams
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs

# Compiles in half the time; for programs whose speed is of no matter.
QUICK = {"xla_backend_optimization_level": 0}
# The bound for float32; the goldens reach 4e-5 on logits of up to 30.
TOLERANCE = 1e-4


def assert_golden(name: str, batch: str, logits) -> None:
    golden = arrays(name)
    real = golden[f"{batch}_mask"] > 0
    np.testing.assert_allclose(
        np.asarray(logits)[real], golden[f"{batch}_logits"], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers_for_full_and_padded_batches(name):
    policy, params = model(name)
    golden = arrays(name)
    for batch in ("full", "right", "left"):
        logits = policy.logits(params, golden[f"{batch}_tokens"], golden[f"{batch}_mask"])
        assert logits.dtype == jnp.float32
        assert_golden(name, batch, logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers_for_rope_types_and_windows(name):
    policy, params = model(name)
    assert_golden(name, "full", policy.logits(params, arrays(name)["full_tokens"]))


def decoded_log_probs(verbs: Verbs, params, tokens, lengths) -> np.ndarray:
    """log p of every next token [B, T, V], by prefilling `lengths` tokens and feeding the others.

    Args:
      tokens: [B, T] int32, padded on the right.
      lengths: [B] int32.
    """
    B, T = tokens.shape
    V = verbs.policy.config.vocab_size
    rows = np.arange(B, dtype=np.int32)
    greedy = SamplingParams(temperature=0, max_tokens=T)
    method = dataclasses.replace(greedy.method, num_alternatives=V)
    params = verbs.load_params(params)
    state = verbs.init_decode_state(Sizes(B, T, rows=B, width=1, prefix=T))
    state = verbs.insert(state, verbs.prefill(params, tokens, lengths), rows)
    found = np.full((B, T, V), np.nan, np.float32)
    for step in range(T - lengths.min()):
        at = np.minimum(lengths + step, T - 1)
        slots = jax.device_get(state.slots)._replace(
            token=tokens[rows, at], position=at, active=rows >= 0, row=rows
        )
        state = verbs.assign(state, rows >= 0, slots, rows[:, None])
        state, results = verbs.generate(
            params, state, greedy.knobs(), method, 1, np.int32(-1), np.int32(1)
        )
        by_token = np.argsort(results.alternatives.tokens[0], axis=-1)
        log_probs = np.take_along_axis(np.asarray(results.alternatives.log_probs[0]), by_token, -1)
        fed = lengths + step < T
        found[rows[fed], at[fed]] = log_probs[fed]
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["unrolled", "stacked"])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"mixtral", "qwen3_moe"}))
def test_decoding_token_by_token_equals_the_forward_of_transformers(name, stacked):
    policy, params = model(name)
    golden, c = arrays(name), policy.config
    tokens, mask = golden["right_tokens"], golden["right_mask"]
    layout = CacheLayout(
        c.num_layers, c.num_kv_heads, c.head_dim, policy.dtype, stacked, transposed_keys=not stacked
    )
    lengths = np.array([1, 9, 5], np.int32)
    found = decoded_log_probs(Verbs(policy, layout), params, tokens, lengths)
    wanted = np.zeros_like(found)
    wanted[mask > 0] = jax.nn.log_softmax(golden["right_logits"])
    compared = (mask > 0) & (np.arange(tokens.shape[1]) >= lengths[:, None])
    np.testing.assert_allclose(found[compared], wanted[compared], rtol=0, atol=TOLERANCE)


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


@pytest.mark.parametrize("sizes", MESHES)
def test_a_model_loaded_onto_eight_devices_equals_transformers(sizes):
    mesh = make_mesh(*sizes)
    policy, params = Policy.from_pretrained(GOLDEN / "llama", mesh=mesh)
    for param, abstract in zip(jax.tree.leaves(params), jax.tree.leaves(policy.abstract_params())):
        assert param.sharding == abstract.sharding
        assert param.shape == abstract.shape
    _, unsharded = model("llama")
    jax.tree.map(np.testing.assert_array_equal, params, unsharded)
    # Eight rows, so that every mesh has work on all devices.
    golden = arrays("llama")
    rows = np.arange(8) % 3
    logits = policy.logits(params, golden["right_tokens"][rows], golden["right_mask"][rows])
    assert_golden("llama", "right", np.asarray(logits)[:3])


def test_random_parameters_do_not_depend_on_the_mesh_and_compile_no_second_forward():
    config = config_of("qwen2")
    key = jax.random.key(3)
    _, params = Policy.from_config(config, key)
    mesh = make_mesh(1, 4, 2)
    sharded_policy, sharded = Policy.from_config(config, key, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, sharded)
    wanted = jax.tree.map(lambda s: s.sharding, sharded_policy.abstract_params())
    assert jax.tree.map(lambda p: p.sharding, sharded) == wanted
    std = float(jnp.std(params["layers"]["gate"]))
    assert std == pytest.approx(config["initializer_range"], rel=0.1)
    assert not np.any(params["layers"]["q_bias"])
    assert np.all(params["final_norm"] == 1.0)

    _, loaded = Policy.from_pretrained(GOLDEN / "qwen2", mesh=mesh)
    tokens = np.ones((8, 6), np.int32)
    before = Policy._logits._cache_size()
    sharded_policy.logits(loaded, tokens)
    sharded_policy.logits(sharded, tokens)
    assert Policy._logits._cache_size() == before + 1


def test_bf16_compute_keeps_float32_parameters_and_float32_logits():
    policy, params = Policy.from_pretrained(GOLDEN / "qwen2", "bfloat16", "float32")
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    golden = arrays("qwen2")
    tokens = golden["full_tokens"]
    logits = np.asarray(policy.logits(params, tokens))
    assert logits.dtype == np.float32
    error = np.abs(logits.reshape(-1, 64) - golden["full_logits"])
    assert 1e-3 < error.mean() < 0.03 * golden["full_logits"].std()


def test_parameters_take_the_compute_dtype_by_default():
    policy, params = Policy.from_pretrained(GOLDEN / "qwen2", dtype="bfloat16")
    assert policy.param_dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers: int) -> int:
        config = {**config_of("llama"), "num_hidden_layers": num_layers}
        policy = Policy.abstract_from_config(config)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

        def loss(params, tokens):
            return policy.hidden(params, tokens, jnp.ones_like(tokens)).sum()

        program = jax.jit(jax.grad(loss)).lower(policy.abstract_params(), tokens)
        return len(program.as_text().splitlines())

    assert lines(3) == lines(24)


def test_log_probs_are_the_log_softmax_of_the_logits_and_zero_where_documented():
    policy, params = model("qwen3")
    golden = arrays("qwen3")
    for batch in ("right", "left"):
        tokens, mask = golden[f"{batch}_tokens"], golden[f"{batch}_mask"]
        scored = np.asarray(policy.log_probs(params, tokens, mask))
        full = jax.nn.log_softmax(policy.logits(params, tokens, mask))
        gathered = np.take_along_axis(np.asarray(full)[:, :-1], tokens[:, 1:, None], axis=-1)
        predicted = (mask[:, 1:] * mask[:, :-1]) > 0
        np.testing.assert_allclose(
            scored[:, 1:][predicted], gathered[..., 0][predicted], rtol=0, atol=1e-5
        )
        assert np.all(scored[:, 1:][~predicted] == 0)
        assert np.all(scored[:, 0] == 0)
        assert np.all(scored[:, 1:][predicted] < 0)


def test_log_probs_do_not_depend_on_the_side_of_the_padding():
    policy, params = model("qwen3")
    full = arrays("qwen3")["full_tokens"]
    left_tokens, left_mask = full.copy(), np.ones_like(full)
    left_tokens[:, :5], left_mask[:, :5] = 0, 0
    right_tokens, right_mask = np.roll(left_tokens, -5, axis=1), np.roll(left_mask, -5, axis=1)
    left = np.asarray(policy.log_probs(params, left_tokens, left_mask))
    right = np.asarray(policy.log_probs(params, right_tokens, right_mask))
    np.testing.assert_allclose(np.roll(left, -5, axis=1), right, rtol=0, atol=2e-5)


def test_completion_log_probs_are_the_last_columns_tempered():
    policy, params = model("qwen3")
    tokens = arrays("qwen3")["full_tokens"]
    score = functools.partial(policy.completion_log_probs, num_completion=7, temperature=0.7)
    score = jax.jit(score, compiler_options=QUICK)
    scored, entropy = score(params, jnp.asarray(tokens), jnp.ones_like(tokens))
    full = jax.nn.log_softmax(policy.logits(params, tokens)[:, -8:-1] / 0.7)
    wanted = np.take_along_axis(np.asarray(full), tokens[:, -7:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(scored, wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(full) * full).sum(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_completion", [-1, 0, 8])
def test_a_completion_without_tokens_or_without_one_before_it_is_refused(num_completion):
    policy, params = model("qwen2")
    tokens = np.ones((1, 8), np.int32)
    with pytest.raises(ValueError, match=f"below the 8 columns of tokens.*given {num_completion}$"):
        policy.completion_log_probs(params, tokens, tokens, num_completion=num_completion)


def test_one_token_has_no_log_prob():
    policy, params = model("qwen3")
    assert np.asarray(policy.log_probs(params, [[5], [6]])).tolist() == [[0.0], [0.0]]


def test_wrong_shapes_and_token_ids_are_refused():
    policy, params = model("qwen3")
    with pytest.raises(ValueError, match=r"both \[B, T\]; given shapes \(3,\)"):
        policy.logits(params, np.ones(3, np.int32))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        policy.logits(params, np.ones((2, 3), np.int32), np.ones((2, 4), np.int32))
    for shape in ((2, 0), (0, 3)):
        for scored in (policy.logits, policy.log_probs):
            with pytest.raises(ValueError, match=rf"at least one row and .* shape \({shape[0]}, "):
                scored(params, np.ones(shape, np.int32))
    with pytest.raises(ValueError, match=r"in \[0, 64\); given 0 to 64"):
        policy.logits(params, np.array([[0, 64]]))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("fp16", "given 'fp16'; did you mean float16"),
        ("bf16", "did you mean bfloat16"),
        ("int8", "given 'int8'$"),
    ],
)
def test_a_dtype_that_no_model_computes_in_is_refused(dtype, words):
    with pytest.raises(
        ValueError, match=rf"^dtype is one of float32, bfloat16, float16; .*{words}"
    ):
        Policy.abstract_from_config(config_of("qwen2"), dtype=dtype)


def test_an_unknown_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"one of .*given 'some'"):
        Policy.from_config(config_of("qwen3"), jax.random.key(0), gradient_checkpointing="some")


def test_gradient_checkpointing_changes_no_gradient():
    policy, params = model("qwen2")
    tokens = jnp.asarray(arrays("qwen2")["full_tokens"])

    def gradient(checkpointing):
        remat = dataclasses.replace(policy, gradient_checkpointing=checkpointing)
        loss = lambda p: remat.hidden(p, tokens, jnp.ones_like(tokens)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    plain = gradient("none")["layers"]
    assert all(np.any(g) for g in plain.values())
    for checkpointing in ("full", "save_dots"):
        recomputed = gradient(checkpointing)["layers"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, recomputed
        )
