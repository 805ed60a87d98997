"""One token of one row: frequencies, truncation, log-probs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adpo_jax.devices import sharding
from adpo_jax.dry_run.hlo import Program
from adpo_jax.engine import sampling
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.records import Prompts
from adpo_jax.rollouts.rows import group_seeds

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, 1.5], np.float32)
CHI_SQUARE_999 = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}


def draw(logits, params, seed=0, generated=None):
    logits = jnp.asarray(logits)
    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), len(logits)))
    generated = jnp.zeros(len(logits), jnp.int32) if generated is None else generated
    return sample(logits, keys, generated, params.knobs(), params.method)


@functools.partial(jax.jit, static_argnums=(4, 5))
def sample(logits, keys, generated, knobs, method, mesh=None):
    uniform = sampling.uniforms(keys, generated)
    return sampling.sample(logits, uniform, generated, knobs, method, mesh)


def truncated_by_sorting(logits, params) -> np.ndarray:
    """Probabilities of the truncated, tempered distribution, the plain way."""
    x = np.asarray(logits, np.float64) / params.temperature
    order = np.argsort(-x)
    p = np.exp(x - x.max())
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


SETTINGS = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(top_k=3),
    "top-p": SamplingParams(top_p=0.7),
    "min-p": SamplingParams(min_p=0.2),
    "all": SamplingParams(temperature=1.3, top_k=6, top_p=0.9, min_p=0.1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_match_the_truncated_distribution(name):
    params, draws = SETTINGS[name], 20_000
    expected = truncated_by_sorting(LOGITS, params)
    drawn = draw(np.tile(LOGITS, (draws, 1)), params)
    counts = np.bincount(np.asarray(drawn.tokens), minlength=len(LOGITS))
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = np.sum((counts - draws * expected)[kept] ** 2 / (draws * expected[kept]))
    assert chi_square < CHI_SQUARE_999[kept.sum() - 1]


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probs_are_those_of_the_distribution_sampled_from(name):
    params = SETTINGS[name]
    drawn = draw(np.tile(LOGITS, (200, 1)), params)
    expected = np.log(truncated_by_sorting(LOGITS, params)[np.asarray(drawn.tokens)])
    np.testing.assert_allclose(drawn.log_probs, expected, atol=1e-5)


def test_full_log_probs_ignore_the_truncation_but_not_the_temperature():
    params = SamplingParams(temperature=0.7, top_k=2, full_log_probs=True)
    drawn = draw(np.tile(LOGITS, (50, 1)), params)
    expected = jax.nn.log_softmax(LOGITS / 0.7)[drawn.tokens]
    np.testing.assert_allclose(drawn.full_log_probs, expected, atol=1e-5)


def test_full_log_probs_count_the_stop_tokens_that_min_tokens_holds_back():
    params = SamplingParams(stop_token_ids=(0,), min_tokens=1, full_log_probs=True)
    drawn = draw(np.tile(LOGITS, (50, 1)), params)
    assert (drawn.tokens != 0).all()
    expected = jax.nn.log_softmax(LOGITS)[drawn.tokens]
    np.testing.assert_allclose(drawn.full_log_probs, expected, atol=1e-5)
    np.testing.assert_allclose(
        drawn.log_probs, expected - np.log(1 - jax.nn.softmax(LOGITS)[0]), atol=1e-5
    )


@pytest.mark.parametrize("vocab", [300, 1000, 1024])
def test_a_vocabulary_of_many_blocks_gives_the_right_frequencies(vocab):
    logits = np.full(vocab, -4.0, np.float32)
    logits[[0, 127, 128, vocab - 1]] = 3.0
    draws = 8_000
    tokens = np.asarray(draw(np.tile(logits, (draws, 1)), SamplingParams()).tokens)
    probs = np.exp(logits) / np.exp(logits).sum()
    groups = np.array([np.mean(tokens == i) for i in (0, 127, 128, vocab - 1)])
    error = np.sqrt(probs[0] * (1 - probs[0]) / draws)
    assert np.abs(groups - probs[0]).max() < 4 * error
    assert tokens.max() < vocab


@pytest.mark.parametrize("name", ["plain", "all", "greedy"])
@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 1, 8)])
def test_a_split_vocabulary_gives_the_same_tokens_and_is_not_gathered(name, sizes):
    params = (SETTINGS | {"greedy": SamplingParams(temperature=0)})[name]
    mesh, B, V = sharding.make_mesh(*sizes), 32, 1000  # blocks of 128 that lie on two devices
    logits = np.random.default_rng(0).normal(0, 3, (B, V)).astype(np.float32)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), B))
    rest = (keys, jnp.zeros(B, jnp.int32), params.knobs(), params.method)
    alone = sample(logits, *rest)
    layout = sharding.named_sharding(mesh, ("batch", "vocab"), logits.shape)
    laid_out = jax.device_put(logits, layout)
    split = sample(laid_out, *rest, mesh)
    np.testing.assert_array_equal(split.tokens, alone.tokens)
    np.testing.assert_allclose(split.log_probs, alone.log_probs, atol=1e-5)
    moved = Program(sample.lower(laid_out, *rest, mesh).compile().as_text()).collectives
    gathered = logits.nbytes // sizes[0]
    assert 0 < max(c.bytes // c.calls for c in moved) < gathered / 4


def test_top_1_is_greedy():
    logits = np.random.default_rng(0).normal(size=(64, 500)).astype(np.float32)
    greedy = draw(logits, SamplingParams(temperature=0)).tokens
    np.testing.assert_array_equal(greedy, logits.argmax(-1))
    np.testing.assert_array_equal(draw(logits, SamplingParams(top_k=1)).tokens, greedy)
    np.testing.assert_array_equal(draw(logits, SamplingParams(top_p=1e-6)).tokens, greedy)
    np.testing.assert_array_equal(draw(logits, SamplingParams(min_p=1.0)).tokens, greedy)


def test_the_first_of_equal_logits_is_greedy():
    logits = np.zeros((1, 9), np.float32)
    logits[0, [4, 7]] = 1
    assert draw(logits, SamplingParams(temperature=0)).tokens[0] == 4


def test_truncation_keeps_what_sorting_keeps():
    logits = np.random.default_rng(1).normal(scale=3, size=(32, 400)).astype(np.float32)
    for params in (SamplingParams(top_k=17), SamplingParams(top_p=0.8), SamplingParams(min_p=0.05)):
        kept = sampling.truncate(jnp.asarray(logits), params.knobs(), params.method) > -jnp.inf
        expected = np.stack([truncated_by_sorting(row, params) > 0 for row in logits])
        np.testing.assert_array_equal(kept, expected)


def test_truncation_tells_neighbouring_floats_apart_beside_minus_infinity():
    top = np.random.default_rng(0).uniform(0.1, 50.0, 64).astype(np.float32)
    least = np.full(64, -np.inf, np.float32)
    logits = np.stack([least, np.nextafter(top, 0), top, 2 * top], axis=-1)
    params = SamplingParams(top_k=2)
    kept = sampling.truncate(jnp.asarray(logits), params.knobs(), params.method) > -jnp.inf
    np.testing.assert_array_equal(kept, [[False, False, True, True]] * 64)


def test_a_uniform_at_either_end_points_at_a_token_with_mass():
    logits = jnp.array([[-jnp.inf, 0.0, 1.0, -jnp.inf]] * 2)
    ends = jnp.array([[0.0, 0.0], [1 - 2**-24] * 2], jnp.float32)
    tokens, _ = sampling.inverse_cdf(logits, jnp.max(logits, -1), ends)
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("sizes", [None, (1, 1, 8)])
def test_logits_that_are_no_numbers_still_give_a_token_of_the_vocabulary(sizes):
    mesh, V = sizes and sharding.make_mesh(*sizes), 1000  # 8 blocks of 128
    logits = jnp.full((2, V), jnp.nan).at[1].set(0.0)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    params = SamplingParams()
    drawn = sample(logits, keys, jnp.zeros(2, jnp.int32), params.knobs(), params.method, mesh)
    assert 0 <= drawn.tokens.min() <= drawn.tokens.max() < V


def test_stop_tokens_wait_for_min_tokens():
    logits = np.full((2, 6), -20.0, np.float32)
    logits[:, 5] = 20
    params = SamplingParams(stop_token_ids=(5,), min_tokens=3)
    drawn = draw(logits, params, generated=jnp.array([2, 3], jnp.int32))
    assert drawn.tokens[0] != 5
    assert drawn.tokens[1] == 5
    np.testing.assert_allclose(drawn.log_probs[0], np.log(1 / 5), atol=1e-4)


def test_settings_that_change_nothing_compile_nothing_in():
    assert SamplingParams().method == sampling.Method()
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1)
    assert greedy.method == sampling.Method(greedy=True)


def test_stop_tokens_are_padded_to_a_multiple_of_eight():
    for count in (0, 8, 9):
        padded = SamplingParams(stop_token_ids=range(count)).knobs().stop_ids
        rest = [-1] * ({0: 8, 8: 8, 9: 16}[count] - count)
        assert padded.tolist() == [*range(count), *rest]


def test_other_numbers_compile_nothing_new():
    one, other = SamplingParams(temperature=0.5, top_p=0.9), SamplingParams(top_p=0.2)
    assert one.method == other.method
    shapes = [[np.shape(x) for x in p.knobs()] for p in (one, other)]
    assert shapes[0] == shapes[1]


def test_a_temperature_next_to_zero_is_greedy_and_nothing_given_is_nothing():
    assert SamplingParams(temperature=1e-38).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 0), ("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("min_p", 1.5)]
    + [("max_tokens", 0), ("min_tokens", 500), ("stop", ("",)), ("stop", [1]), ("n", 2.5)]
    + [
        ("n", True),
        ("top_k", 2**40),
        ("top_k", 2.9),
        ("max_tokens", 2**40),
        ("temperature", np.inf),
    ]
    + [("stop_token_ids", [2**40]), ("stop_token_ids", [1.7]), ("stop_token_ids", 5)]
    + [("ignore_eos", "false"), ("full_log_probs", "no")],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        SamplingParams(**{name: value})


ROWS = [
    SamplingParams(temperature=0, max_tokens=3, top_p=0.5),
    SamplingParams(temperature=0.6, top_p=0.7),
    SamplingParams(top_k=3, min_p=0.1, min_tokens=2, stop_token_ids=(0,)),
    SamplingParams(temperature=1.3, stop_token_ids=(1, 2)),
]


def test_knobs_a_row_sample_each_row_as_its_own_knobs_do():
    """What a server does: rows with settings of their own in one program."""
    V = 300
    rng = np.random.default_rng(0)
    for seed in range(20):
        logits = rng.normal(0, 2, (len(ROWS), V)).astype(np.float32)
        logits[2, 0] = 9.0  # the stop token that min_tokens holds back
        keys = jax.random.key_data(jax.random.split(jax.random.key(seed), len(ROWS)))
        generated = jnp.zeros(len(ROWS), jnp.int32)
        knobs = jax.tree.map(lambda *each: np.stack(each), *(p.knobs() for p in ROWS))
        method = sampling.Method(
            mixed=True, top_k=True, top_p=True, min_p=True, min_tokens=True, num_alternatives=5
        )
        together = sample(logits, keys, generated, knobs, method)
        for i, params in enumerate(ROWS):
            row = slice(i, i + 1)
            alone = sample(logits[row], keys[row], generated[row], params.knobs(), params.method)
            assert together.tokens[i] == alone.tokens[0]
            np.testing.assert_allclose(together.log_probs[i], alone.log_probs[0], atol=1e-6)


def test_alternatives_are_the_likeliest_tokens_under_the_distribution_sampled_from():
    params = SamplingParams(temperature=0.5, top_k=3)
    method = dataclasses.replace(params.method, num_alternatives=4)
    key = jax.random.key_data(jax.random.split(jax.random.key(0), 1))
    drawn = sample(LOGITS[None], key, jnp.zeros(1, jnp.int32), params.knobs(), method)
    expected = truncated_by_sorting(LOGITS, params)
    np.testing.assert_array_equal(drawn.alternatives.tokens[0, :3], np.argsort(-expected)[:3])
    likeliest = np.exp(drawn.alternatives.log_probs[0])
    np.testing.assert_allclose(likeliest, np.sort(expected)[::-1][:4], atol=1e-6)


def test_a_share_of_a_batch_tells_copies_apart_as_the_batch_does():
    batch = Prompts([[3, 4], [5], [3, 4], [3, 4], [5]], {})
    whole = sampling.prompt_uids(batch.token_ids)
    assert len(set(whole)) == 5
    seeds = group_seeds(jax.random.key(1), batch)
    assert len(set(seeds)) == 5
    for rows in (range(2), range(2, 5), range(0), range(5)):
        part = batch.share(rows)
        uids = sampling.prompt_uids(part.token_ids, part.copy_numbers)
        assert uids.tolist() == whole[rows].tolist()
        assert group_seeds(jax.random.key(1), part) == seeds[rows.start : rows.stop]
