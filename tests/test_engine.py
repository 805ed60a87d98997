"""The engine against the plain forward of the policy, and against itself in another shape."""

import array
import dataclasses
import re
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import decoders

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.generation import tokens_to_stop_string
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.rope import Rope

V = 61
MIXED = [5, 1, 12, 20, 2]  # prompt lengths


def config(**changes) -> ModelConfig:
    return tiny.model_config(**{"vocab_size": V} | changes)


FAMILIES = {
    "qwen3": {"qk_norm": True},
    "qwen2": {"qkv_bias": True, "tie_embeddings": False},
    "llama": {"tie_embeddings": False, "ropes": (Rope(5e5, "linear", 2.0),)},
    "mistral": {"windows": (6, 6), "tie_embeddings": False},
    "gemma2": {
        "windows": (6, None),
        "norm_plus_one": True,
        "post_norms": True,
        "embed_scale": True,
        "attention_soft_cap": 20.0,
        "logit_soft_cap": 15.0,
        "activation": "gelu_tanh",
    },
    "gemma3": {
        "windows": (6, None),
        "norm_plus_one": True,
        "post_norms": True,
        "embed_scale": True,
        "qk_norm": True,
        "ropes": (Rope(1e4), Rope(1e6)),
        "layer_ropes": (0, 1),
        "activation": "gelu_tanh",
    },
}


@pytest.fixture(scope="module")
def model():
    policy = Policy(config(qk_norm=True))
    return policy, policy.init(jax.random.key(0))


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, length).tolist() for length in lengths]


def engine_of(policy, **options):
    sizes = {"max_prompt_length": 24, "max_response_length": 40, "num_slots": 8}
    return Engine(policy, **{**sizes, **options})


def full_forward(function, params, prompt, completion):
    """A [1, T, ...] function of the whole sequence, padded so that few lengths are compiled."""
    row = np.zeros((1, 72), np.int32)
    sequence = [*prompt, *completion]
    row[0, : len(sequence)] = sequence
    mask = (np.arange(72) < len(sequence)).astype(np.int32)[None]
    return np.asarray(function(params, row, mask))[0]


def assert_greedy_is_argmax(policy, params, prompts, out):
    for prompt, group in zip(prompts, out.groups, strict=True):
        for completion in group:
            logits = full_forward(policy.logits, params, prompt, completion.tokens)
            predicted = logits[len(prompt) - 1 :][: len(completion)].argmax(-1)
            np.testing.assert_array_equal(completion.tokens, predicted)


def assert_log_probs_agree(policy, params, prompts, out, atol=1e-4):
    for prompt, group in zip(prompts, out.groups, strict=True):
        for completion in group:
            scored = full_forward(policy.log_probs, params, prompt, completion.tokens)
            scored = scored[len(prompt) :][: len(completion)]
            np.testing.assert_allclose(completion.log_probs, scored, atol=atol)


def assert_equal_tokens(groups, others):
    """Two lists of groups have the same completions."""
    for group, other in zip(groups, others, strict=True):
        for one, another in zip(group, other, strict=True):
            np.testing.assert_array_equal(one.tokens, another.tokens)


def assert_close_log_probs(groups, others, atol):
    for group, other in zip(groups, others, strict=True):
        for one, another in zip(group, other, strict=True):
            np.testing.assert_allclose(one.log_probs, another.log_probs, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_the_full_forward_in_every_family(family):
    policy = Policy(config(**FAMILIES[family]))
    params = policy.init(jax.random.key(1))
    prompts = prompts_of(MIXED)
    # 4 slots for 10 samples: slots are refilled at different ages.
    engine = engine_of(policy, num_slots=4)
    sampling = SamplingParams(n=2, temperature=0, max_tokens=18, stop_token_ids=(3, 4, 5))
    out = engine.generate(params, prompts, sampling, jax.random.key(0))
    assert_greedy_is_argmax(policy, params, prompts, out)


def test_log_probs_equal_those_of_the_full_forward(model):
    policy, params = model
    prompts = prompts_of(MIXED)
    sampling = SamplingParams(n=3, max_tokens=40, stop_token_ids=(7, 8))
    out = engine_of(policy).generate(params, prompts, sampling, jax.random.key(1))
    assert_log_probs_agree(policy, params, prompts, out)
    for completion in out.flat:
        stopped = completion.tokens[-1] in (7, 8)
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion) == 40


def test_a_completion_says_all_there_is_to_say_of_its_tokens(model):
    policy, params = model
    sampling = SamplingParams(n=2, max_tokens=7)
    out = engine_of(policy).generate(
        params, prompts_of([3]), sampling, jax.random.key(1), version=4
    )
    for completion in out.flat:
        assert completion.trained.tolist() == [True] * 7
        assert completion.versions.tolist() == [4] * 7
        assert completion.turns.tolist() == [0] * 7
        assert completion.full_log_probs is None
        # No larger array is kept alive by it.
        assert completion.tokens.base is None


def test_scanned_layers_sample_what_unrolled_ones_do(model, monkeypatch):
    policy, params = model
    prompts, sampling = prompts_of(MIXED), SamplingParams(n=2, max_tokens=12)
    unrolled = engine_of(policy).generate(params, prompts, sampling, jax.random.key(2))
    monkeypatch.setattr("adpo_jax.engine.tuning.MAX_UNROLLED_ON_CPU", 0)
    engine = engine_of(policy)
    assert engine.verbs.layout.stacked
    scanned = engine.generate(params, prompts, sampling, jax.random.key(2))
    assert_equal_tokens(scanned.groups, unrolled.groups)
    assert_close_log_probs(scanned.groups, unrolled.groups, atol=1e-5)


def test_samples_do_not_depend_on_slots_order_or_company(model):
    policy, params = model
    prompts = prompts_of(MIXED)
    sampling = SamplingParams(n=3, max_tokens=40, stop_token_ids=tuple(range(8)))
    key = jax.random.key(3)
    many = engine_of(policy, num_slots=16).generate(params, prompts, sampling, key)
    few = engine_of(policy, num_slots=2, steps_per_dispatch=5)
    reversed_order = few.generate(params, prompts[::-1], sampling, key)
    assert_equal_tokens(reversed_order.groups[::-1], many.groups)
    assert_close_log_probs(reversed_order.groups[::-1], many.groups, atol=1e-5)
    alone = few.generate(params, prompts[2:3], sampling, key)
    assert_equal_tokens(alone.groups, many.groups[2:3])


def test_the_last_samples_may_start_as_the_batch_shrinks(model):
    policy, params = model
    # 16 samples end in one step; 4 of two groups wait, start in their slots, and the batch halves.
    prompts, sampling = prompts_of([6] * 10), SamplingParams(n=2, max_tokens=4)
    key = jax.random.key(13)
    wide = engine_of(policy, num_slots=16).generate(params, prompts, sampling, key)
    assert wide.stats["slot_steps"] == 4 * 16 + 4 * 8
    narrow = engine_of(policy, num_slots=8).generate(params, prompts, sampling, key)
    assert_equal_tokens(wide.groups, narrow.groups)


def test_keys_samples_and_equal_prompts_differ(model):
    policy, params = model
    engine, prompt = engine_of(policy), prompts_of([6])[0]
    sampling = SamplingParams(n=2, max_tokens=20)
    out = engine.generate(params, [prompt, prompt], sampling, jax.random.key(4))
    assert len(np.unique(out.padded("tokens").reshape(4, -1), axis=0)) == 4
    other = engine.generate(params, [prompt, prompt], sampling, jax.random.key(5))
    assert (other.padded("tokens") != out.padded("tokens")).any()
    again = engine.generate(params, [prompt, prompt], sampling, jax.random.PRNGKey(4))
    assert_equal_tokens(again.groups, out.groups)
    wide = engine.generate(params, [prompt, prompt], sampling, jax.random.key(4, impl="rbg"))
    bits = jax.random.key_data(jax.random.key(4, impl="rbg"))
    by_bits = engine.generate(params, [prompt, prompt], sampling, bits)
    assert_equal_tokens(by_bits.groups, wide.groups)
    # The first half of its bits is zero for every small seed.
    other = engine.generate(params, [prompt, prompt], sampling, jax.random.key(5, impl="rbg"))
    assert (other.padded("tokens") != wide.padded("tokens")).any()


def test_a_prompt_is_prefilled_once_for_all_its_samples(model):
    policy, params = model
    prompts = prompts_of(MIXED)
    sampling = SamplingParams(n=4, max_tokens=4)
    out = engine_of(policy).generate(params, prompts, sampling, jax.random.key(0))
    assert out.stats["prefill_tokens"] == sum(MIXED) - len(MIXED)
    state = engine_of(policy).verbs.init_decode_state(Sizes(8, 16, rows=2, width=4, prefix=24))
    # Two rows of 24 tokens for two groups of four; a copy a sample would be eight.
    assert state.prefix.kv[0].v.shape == (2, 2, 24, 16)


def test_the_first_token_may_be_the_stop_token(model):
    policy, params = model
    sampling = SamplingParams(n=2, max_tokens=9, stop_token_ids=tuple(range(V)))
    out = engine_of(policy).generate(params, prompts_of([3, 1]), sampling, jax.random.key(0))
    assert out.lengths.tolist() == [[1, 1], [1, 1]]
    assert (out.finish_reasons == "stop").all()
    assert all(completion.tokens.shape == (1,) for completion in out.flat)


def test_ignore_eos_runs_to_the_length(model):
    policy, params = model
    sampling = SamplingParams(max_tokens=9, stop_token_ids=tuple(range(V)), ignore_eos=True)
    out = engine_of(policy).generate(params, prompts_of([3]), sampling, jax.random.key(0))
    assert out.lengths.item() == 9
    assert out.finish_reasons.item() == "length"


def test_min_tokens_holds_the_stop_tokens_back(model):
    policy, params = model
    sampling = SamplingParams(n=4, max_tokens=12, min_tokens=5, stop_token_ids=tuple(range(40)))
    out = engine_of(policy).generate(params, prompts_of([3, 4]), sampling, jax.random.key(0))
    assert out.lengths.min() >= 5
    assert all((completion.tokens[:4] >= 40).all() for completion in out.flat)


@pytest.mark.parametrize(("length", "n", "max_tokens"), [(24, 1, 1), (24, 1, 40), (1, 5, 1)])
def test_sizes_at_their_limits(model, length, n, max_tokens):
    policy, params = model
    prompts = prompts_of([length, 2])
    sampling = SamplingParams(n=n, max_tokens=max_tokens)
    out = engine_of(policy).generate(params, prompts, sampling, jax.random.key(6))
    assert (out.lengths == max_tokens).all()
    assert (out.finish_reasons == "length").all()
    assert_log_probs_agree(policy, params, prompts, out)


@pytest.mark.parametrize("min_tokens", [0, 7])
def test_a_stop_string_across_tokens_ends_a_completion_where_it_is_complete(model, min_tokens):
    policy, params = model
    letters = [chr(97 + i % 4) for i in range(V)]  # many tokens a letter

    def detokenize(ids):
        return "".join(letters[i] for i in ids)

    prompts, key = prompts_of(MIXED), jax.random.key(7)
    engine = engine_of(policy, num_slots=4, detokenize=detokenize)
    free = engine.generate(params, prompts, SamplingParams(n=3, max_tokens=40), key)
    sampling = SamplingParams(n=3, max_tokens=40, min_tokens=min_tokens, stop=("abc", "dd"))
    out = engine.generate(params, prompts, sampling, key)
    assert (out.finish_reasons == "stop").any()
    for completion, unstopped in zip(out.flat, free.flat, strict=True):
        text = detokenize(unstopped.tokens)
        ends = [text.find(s) + len(s) for s in ("abc", "dd") if s in text]
        assert len(completion) == max(min(ends, default=40), min_tokens)
        assert completion.finish_reason == ("stop" if ends else "length")
        np.testing.assert_array_equal(completion.tokens, unstopped.tokens[: len(completion)])


def in_bytes(ids) -> str:
    """Every token is a byte, and a run of them with a broken end has no text at all."""
    pieces = [f"<0x{i:02X}>" if i > 32 else chr(i) for i in ids]
    return "".join(decoders.ByteFallback().decode(pieces))


@pytest.mark.parametrize(
    ("said", "min_tokens", "ends"),
    [
        (b"a \xf0\x9f\xa6\x99\xf0\x9f\xa6\x99 b", 0, 6),
        (b"a \xf0\x9f\xa6\x99\xf0\x9f\xa6\x99 b", 7, 10),
        (b"a \xf0\x9f\xa6\x99\xf0 b c", 0, 6),
        (b"\xf0 \xf0\x9f\xf0\x9f\xa6\x99 b", 0, None),
    ],
)
def test_a_stop_string_of_bytes_ends_a_completion_however_tokens_are_handed_over(
    said, min_tokens, ends
):
    sampling = SamplingParams(stop=("🦙",), min_tokens=min_tokens)
    for steps in (*range(1, 9), 32):
        old, found = array.array("i"), None
        while found is None and len(old) < len(said):
            new = np.array(list(said[len(old) :][:steps]), np.int32)
            count = tokens_to_stop_string(in_bytes, sampling, old, new, len(old))
            found = None if count is None else len(old) + count
            old.frombytes(new.tobytes())
        assert found == ends, steps


def test_groups_are_handed_over_as_they_end(model, monkeypatch):
    policy, params = model
    prompts, done, dispatches, seen = prompts_of(MIXED), [], [], []
    generate = Verbs.generate

    def counted(*args, **kwargs):
        dispatches.append(1)
        return generate(*args, **kwargs)

    def on_group_done(group):
        done.append(group)
        seen.append(len(dispatches))

    monkeypatch.setattr(Verbs, "generate", counted)
    sampling = SamplingParams(n=2, max_tokens=30, stop_token_ids=tuple(range(10)))
    engine = engine_of(policy, num_slots=2, steps_per_dispatch=4)
    out = engine.generate(params, prompts, sampling, jax.random.key(8), on_group_done=on_group_done)
    assert seen[0] < len(dispatches)
    assert sorted(group.prompt_index for group in done) == list(range(len(prompts)))
    assert all(group.completions is out[group.prompt_index] for group in done)


def test_new_tokens_are_handed_over_after_every_dispatch(model):
    policy, params = model
    prompts, seen, ended = prompts_of(MIXED), {}, {}
    sampling = SamplingParams(n=2, max_tokens=30, stop_token_ids=tuple(range(10)))

    def on_tokens(prompt, sample, tokens):
        assert 1 <= len(tokens) <= 4
        assert (prompt, sample) not in ended
        seen.setdefault((prompt, sample), []).extend(tokens.tolist())

    def on_completion(prompt, sample, completion):
        ended[prompt, sample] = completion
        assert seen.pop((prompt, sample)) == completion.tokens.tolist()

    engine = engine_of(policy, num_slots=4, steps_per_dispatch=4)
    hooks = {"on_tokens": on_tokens, "on_completion": on_completion}
    alone = 0
    for group in engine.stream(params, prompts, sampling, jax.random.key(8), **hooks):
        for sample, completion in enumerate(group.completions):
            assert ended.pop((group.prompt_index, sample)) is completion
        alone += len(ended)  # those whose groups have not ended
    assert not seen
    assert not ended
    assert alone


def test_host_memory_follows_the_tokens_that_there_are(model):
    """Of 32 samples with room for 100,000 tokens each, some ten are sampled."""
    policy, params = model
    engine = engine_of(policy, max_response_length=100_000, num_slots=2)
    engine.column_stages = 10_000  # so that the ring stays small
    sampling = SamplingParams(n=4, max_tokens=100_000, stop_token_ids=tuple(range(6)))
    prompts, key = prompts_of([4] * 8), jax.random.key(9)
    engine.generate(params, prompts, sampling, key)  # compiles
    tracemalloc.start()
    out = engine.generate(params, prompts, sampling, key)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 100_000 * 8 / 10
    assert out.lengths.sum() < 10_000


def test_mixed_lengths_pay(model):
    policy, params = model
    sampling = SamplingParams(n=4, max_tokens=40, stop_token_ids=tuple(range(12)))
    prompts = prompts_of([4] * 10)
    out = engine_of(policy).generate(params, prompts, sampling, jax.random.key(9))
    # Batches of 8 that wait for their longest sample would run this many steps of 8 slots.
    batches = out.lengths.reshape(-1, 8).max(-1).sum() * 8
    assert out.stats["slot_steps"] < 0.7 * batches


def test_new_parameters_and_new_numbers_compile_nothing(model):
    policy, params = model
    engine, prompts = engine_of(policy), prompts_of([5, 6])
    sampling = SamplingParams(n=4, max_tokens=8)
    engine.generate(params, prompts, sampling, jax.random.key(0))
    verbs = type(engine.verbs)
    count = lambda: sum(  # noqa: E731
        f._cache_size() for f in (verbs.prefill, verbs.insert, verbs.assign, verbs.generate)
    )
    before = count()
    other = jax.tree.map(lambda x: x * 1.01, params)
    warmer = dataclasses.replace(sampling, temperature=0.7, stop_token_ids=(1, 2))
    out = engine.generate(other, prompts_of([5, 6], seed=1), warmer, jax.random.key(1))
    assert count() == before
    assert np.isfinite(out.padded("log_probs")).all()


def test_a_decode_program_is_compiled_for_each_size_and_no_more(model, monkeypatch, caplog):
    policy, params = model
    engine = engine_of(policy, num_slots=16, max_response_length=48)
    verbs, sizes = type(engine.verbs), set()
    generate = verbs.generate

    def recorded(self, params, state, *rest):
        columns, prefix = state.ring[0].v.shape[2], state.prefix.kv[0].v.shape[2]
        sizes.add((len(state.slots.token), columns, prefix, state.members.shape))
        return generate(self, params, state, *rest)

    monkeypatch.setattr(verbs, "generate", recorded)
    sampling = SamplingParams(n=4, max_tokens=48, stop_token_ids=(1, 2, 3))
    # The longest prompt of a call decides; 24 is the limit.
    with jax.log_compiles():
        for seed, lengths in enumerate([[3] * 4, [2, 9, 17, 1], [23, 24, 4, 4], [3, 5, 7, 17]]):
            engine.generate(params, prompts_of(lengths, seed), sampling, jax.random.key(seed))
    compiled = [text for text in caplog.messages if text.startswith("Compiling jit(generate)")]
    assert 0 < len(compiled) <= len(sizes)
    assert {prefix for _, _, prefix, _ in sizes} == {16, 24}
    widths = {}
    for slots, _, prefix, members in sizes:
        widths.setdefault((slots, prefix), set()).add(members)
    assert all(len(tables) <= 2 for tables in widths.values())


def accelerator(monkeypatch):
    """Engines made from here on take this machine for a GPU's host."""
    monkeypatch.setattr(
        "adpo_jax.engine.engine._device",
        lambda _: types.SimpleNamespace(platform="gpu", device_kind="one"),
    )


def test_an_accelerator_starts_with_the_smallest_batch_that_holds_the_call(model, monkeypatch):
    policy, params = model
    accelerator(monkeypatch)
    engine = engine_of(policy, num_slots=None, free_cache_engine=False, attention="xla")
    assert engine.slot_sizes == [8, 16, 32, 64, 128, 256]
    sampling = SamplingParams(n=2, max_tokens=40, stop_token_ids=(1,))
    prompts = prompts_of(MIXED)
    out = engine.generate(params, prompts, sampling, jax.random.key(3))
    # No smaller as samples end; the ring grows.
    assert out.stats["slot_steps"] == 16 * out.stats["steps"]
    assert out.stats["resizes"] > 0
    kept = engine._kept.ring[0].k.unsafe_buffer_pointer()
    again = engine.generate(params, prompts, sampling, jax.random.key(3))
    assert engine._kept.ring[0].k.unsafe_buffer_pointer() == kept
    assert_equal_tokens(again.groups, out.groups)
    alone = engine.generate(params, prompts[:1], sampling, jax.random.key(3))
    assert alone.stats["slot_steps"] == 8 * alone.stats["steps"]
    assert_equal_tokens(alone.groups, out.groups[:1])


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("num_slots", [0, -3], "a whole number, 1 or more"),
        ("steps_per_dispatch", [0, -3], "a whole number, 1 or more"),
        ("group_size", [0, -3, 2.0, None], "a whole number, 1 or more"),
        ("max_prompt_length", [True, None, "8"], "a whole number, 1 or more"),
        (
            "gpu_memory_utilization",
            [90, 0, -1.0, np.nan, "0.9"],
            "a fraction above 0 and at most 1",
        ),
        ("resident_bytes", [-1, np.nan, np.inf, None], "a number of bytes, 0 or more"),
        ("page_size", [8.0, "8", True, None, 4], "a power of two, 8 or more"),
        ("prefill_chunk_size", [16.0, "16", 0.0, False, None, -16], "a power of two, 16 or more"),
        (
            "cache_dtype",
            ["int4", jnp.int16, np.dtype("uint8"), "bool", "float8_e4m3fn", "bf16", ""],
            "one of float32, bfloat16, float16, int8",
        ),
    ],
)
def test_a_value_that_no_engine_has_is_refused_by_name(model, name, values, wanted):
    for value in values:
        with pytest.raises(
            ValueError, match=f"{name} is {wanted}.*; given {re.escape(repr(value))}"
        ):
            engine_of(model[0], **{name: value})


@pytest.mark.parametrize(
    ("dtype", "atol"), [(jnp.bfloat16, 0.15), (jnp.int8, 0.15), (jnp.float32, 1e-4)]
)
def test_a_smaller_cache_dtype_stays_close(model, dtype, atol):
    policy, params = model
    prompts = prompts_of([9, 3])
    sampling = SamplingParams(n=2, max_tokens=20)
    engine = engine_of(policy, cache_dtype=dtype)
    out = engine.generate(params, prompts, sampling, jax.random.key(10))
    assert_log_probs_agree(policy, params, prompts, out, atol=atol)


def test_the_scales_of_an_int8_cache_follow_its_columns(model):
    """Through a ring that grows and goes round, refilled slots and a batch that shrinks."""
    policy, params = model
    prompts = prompts_of(MIXED + [9] * 3)
    sampling = SamplingParams(n=4, max_tokens=40, stop_token_ids=(3,))
    engine = engine_of(policy, num_slots=16, cache_dtype=jnp.int8, steps_per_dispatch=8)
    out = engine.generate(params, prompts, sampling, jax.random.key(14))
    assert out.stats["resizes"] > 1
    assert out.stats["steps"] > 64
    assert_log_probs_agree(policy, params, prompts, out, atol=0.2)


def test_full_log_probs_are_the_trainers_under_truncation(model):
    policy, params = model
    prompts = prompts_of(MIXED)
    sampling = SamplingParams(
        n=2, max_tokens=12, top_k=9, min_tokens=3, stop_token_ids=(1, 2), full_log_probs=True
    )
    out = engine_of(policy).generate(params, prompts, sampling, jax.random.key(15))
    assert all((c.log_probs >= c.full_log_probs - 1e-6).all() for c in out.flat)
    whole = out.map(lambda c: dataclasses.replace(c, log_probs=c.full_log_probs))
    assert_log_probs_agree(policy, params, prompts, whole)


@pytest.mark.parametrize("columns", [8, 16, 40])
def test_a_resized_ring_holds_what_gathering_column_by_column_gives(model, columns):
    policy, _ = model
    verbs, rng = engine_of(policy).verbs, np.random.default_rng(0)
    state = verbs.init_decode_state(Sizes(4, 16, rows=2, width=2, prefix=8))
    filled = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state.ring)
    column, kept, old_slots = 5, 7, np.array([3, 1, 4], np.int32)  # the third is empty
    state = state._replace(ring=filled, column=np.int32(column))
    resized = verbs.resize(state, old_slots, state.members, columns, np.int32(kept))
    take = (column - kept + np.arange(kept)) % 16
    for old, new in zip(filled, resized.ring):
        np.testing.assert_array_equal(new.k[:2, ..., :kept], old.k[old_slots[:2]][..., take])
        np.testing.assert_array_equal(new.v[:2, :, :kept], old.v[old_slots[:2]][:, :, take])
        assert new.v.shape[2] == columns
    assert resized.column == kept % columns
    assert not resized.slots.active[2]


def test_bfloat16_decoding_of_float32_weights_is_close_to_the_bfloat16_forward():
    policy = Policy(config(qk_norm=True), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    params = policy.init(jax.random.key(3))
    engine, prompts = engine_of(policy), prompts_of([9, 3])
    loaded = engine.verbs.load_params(params)
    assert loaded["embed"].dtype == loaded["layers"][0]["qkv"].dtype == jnp.bfloat16
    assert loaded["final_norm"].dtype == jnp.float32
    out = engine.generate(params, prompts, SamplingParams(n=2, max_tokens=20), jax.random.key(0))
    assert_log_probs_agree(policy, params, prompts, out, atol=0.2)


def test_eight_devices_sample_what_one_does(model):
    from adpo_jax.devices.sharding import make_mesh

    policy, params = model
    prompts = prompts_of(MIXED)
    sampling = SamplingParams(n=3, max_tokens=12, stop_token_ids=(3, 4))
    one = engine_of(policy, num_slots=8).generate(params, prompts, sampling, jax.random.key(11))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = dataclasses.replace(policy, mesh=mesh)
    shardings = jax.tree.map(lambda s: s.sharding, sharded.abstract_params())
    engine = engine_of(sharded, num_slots=8)
    out = engine.generate(jax.device_put(params, shardings), prompts, sampling, jax.random.key(11))
    assert_equal_tokens(out.groups, one.groups)
    assert_close_log_probs(out.groups, one.groups, atol=1e-4)
    # Fewer prompts than devices: the samples of one lie beside several copies of its keys.
    alone = engine.generate(
        jax.device_put(params, shardings), prompts[:1], sampling, jax.random.key(11)
    )
    assert_equal_tokens(alone.groups, one.groups[:1])


def test_attention_of_decoding_moves_nothing_between_devices(model):
    from adpo_jax.devices.sharding import make_mesh
    from adpo_jax.dry_run.hlo import Program

    sharded = dataclasses.replace(model[0], mesh=make_mesh(data=4, fsdp=1, tensor=2))
    engine = engine_of(sharded, num_slots=32)
    decode = engine.trace(SamplingParams(n=4, max_tokens=40))["decode"]
    moved = Program(decode.lower().compile().as_text()).collectives
    sources = {c.source for c in moved}
    assert any("dot_general" in source for source in sources)  # of the products split over `tensor`
    assert not [source for source in sources if "attention/" in source and "dot" not in source]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1] * 25], {}, "prompt 0 is a list of 1 to 24 token ids"),
        ([[1], []], {}, "prompt 1 is a list"),
        ([[V]], {}, "outside"),
        ([[0.5]], {}, "made of token ids"),
        ([[1]], {"max_tokens": 41}, "max_response_length"),
        ([[1]], {"stop": ("x",)}, "detokenize"),
        ([[1]], {"routed_experts": True}, "routed_experts needs a mixture of experts"),
        ([[1]], {"prompt_experts": True}, "prompt_experts needs a mixture of experts"),
    ],
)
def test_what_the_engine_was_not_made_for_is_refused(model, prompts, changes, message):
    policy, params = model
    sampling = SamplingParams(**{"max_tokens": 4, **changes})
    with pytest.raises(ValueError, match=message):
        engine_of(policy).generate(params, prompts, sampling, jax.random.key(0))


def test_the_tpu_kernel_interpreted_in_the_engine_samples_what_xla_does():
    policy = Policy(config(head_dim=128, num_heads=4, num_kv_heads=2, windows=(7, None)))
    params = policy.init(jax.random.key(2))
    prompts, sampling = prompts_of([5, 18]), SamplingParams(n=2, max_tokens=10)
    key = jax.random.key(12)
    plain = engine_of(policy).generate(params, prompts, sampling, key)
    kernel = engine_of(policy, attention="pallas_tpu_interpret", num_slots=3)
    out = kernel.generate(params, prompts, sampling, key)
    assert_equal_tokens(out.groups, plain.groups)
    assert_close_log_probs(out.groups, plain.groups, atol=1e-4)


def test_the_program_of_28_layers_is_hardly_larger_than_that_of_4():
    def size(layers: int) -> int:
        changes = {"windows": (None,) * layers, "layer_ropes": (0,) * layers}
        policy = Policy(config(num_layers=layers, **changes))
        verbs = engine_of(policy).verbs
        sampling = SamplingParams(n=2)
        sizes = Sizes(8, 32, rows=4, width=2, prefix=16)
        state = jax.eval_shape(lambda: verbs.init_decode_state(sizes))
        params = jax.eval_shape(verbs.load_params, policy.abstract_params())
        numbers = (np.int32(0), np.int32(8))
        lowered = type(verbs).generate.lower(
            verbs, params, state, sampling.knobs(), sampling.method, 8, *numbers
        )
        return len(lowered.as_text())

    assert size(28) < 1.5 * size(4)
