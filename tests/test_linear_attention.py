"""Linear attention (Qwen3-Next, Qwen3.5): two forms, packed streams, engine and training."""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_models import arrays, assert_adapters_come_back, config_of, drawn, drawn_model
from hypothesis import given, settings
from hypothesis import strategies as st
from parsing import parse
from safetensors.numpy import save_file
from test_families import adapted
from test_policy import QUICK, TOLERANCE, decoded_log_probs
from test_resume import assert_same, interrupt
from test_train import REWARD, scalars, train, with_reward
from test_train import TINY as TINY_RUN
from test_turns import MOST_TURNS, SAMPLING, converse, engine_of, late, prompts_of, whole_forward
from test_turns import assert_same as assert_scripts_agree

import adpo_jax
from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices import flops
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine import cache_plan, kv_cache, tuning
from adpo_jax.engine.continuous import ContinuousBatch
from adpo_jax.engine.engine import _layout
from adpo_jax.engine.tuning import engine_tuning
from adpo_jax.engine.verbs import Verbs
from adpo_jax.hf.tensors import leaves
from adpo_jax.model import linear_attention, lora, parameters
from adpo_jax.model.linear_attention import Inputs
from adpo_jax.model.linear_attention_chunks import chunked
from adpo_jax.records import Completion, Sequences
from adpo_jax.update import make_log_probs, packing

# A tiny model of both kinds of layers; published settings have other sizes.
TINY = {
    "model_type": "qwen3_5_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "full_attention_interval": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


@functools.cache
def tiny_hybrid():
    """(policy, params) of random weights."""
    return Policy.from_config(TINY, jax.random.key(0))


# --- the two forms


def drawn_inputs(rng, B: int, T: int, N=1, M=2, n=4, m=3, t=4) -> Inputs:
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return Inputs(
        normal(B, T, N, n),
        normal(B, T, N, n),
        normal(B, T, M, m),
        -jnp.exp(normal(B, T, M)),
        jax.nn.sigmoid(normal(B, T, M)),
        normal(N, n, t),
        normal(N, n, t),
        normal(M, m, t),
    )


def drawn_segments(rng, T: int) -> np.ndarray:
    """Segments of one row [T], with padding before, between and behind them."""
    segments, at, number = np.zeros(T, np.int32), int(rng.integers(0, 4)), 1
    while at < T:
        length = int(rng.integers(1, 12))
        segments[at : at + length] = number
        at, number = at + length + int(rng.choice([0, 0, 2])), number + 1
    return segments


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(form, inputs: Inputs, segments, weights):
    def loss(inputs):
        out, memory = form(inputs, segments)
        out = jnp.where((segments > 0)[..., None, None], out, 0.0)
        total = jnp.sum(out * weights) + sum(jnp.sum(jnp.sin(x)) for x in memory)
        return total, (out, memory)

    return jax.grad(loss, has_aux=True)(inputs)


FORMS = {chunk: functools.partial(chunked, chunk=chunk) for chunk in (4, 8, 16)}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from(sorted(FORMS)))
def test_the_chunked_form_equals_the_recurrent_one_with_its_gradient(seed, chunk):
    rng = np.random.default_rng(seed)
    inputs = drawn_inputs(rng, 2, 30)
    segments = jnp.asarray(np.stack([drawn_segments(rng, 30) for _ in range(2)]))
    weights = jnp.asarray(rng.standard_normal(inputs.v.shape), jnp.float32)
    plain = outputs_and_gradients(linear_attention.recurrent, inputs, segments, weights)
    found = outputs_and_gradients(FORMS[chunk], inputs, segments, weights)
    (wanted_gradient, wanted), (gradient, out) = plain, found
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    for a, b in zip(gradient, wanted_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("seed", "cut", "chunk"), [(0, 2, 4), (1, 13, 8), (2, 24, 16)])
def test_rows_that_go_on_from_a_memory_give_what_they_give_whole(seed, cut, chunk):
    rng = np.random.default_rng(seed)
    inputs, lengths = drawn_inputs(rng, 3, 30), np.array([30, cut + 1, cut - 1])

    def part(start, stop):
        counts = np.clip(lengths - start, 0, stop - start)
        segments = jnp.asarray(np.arange(stop - start) < counts[:, None], jnp.int32)
        return Inputs(*(x[:, start:stop] for x in inputs[:5]), *inputs[5:]), segments

    form = jax.jit(FORMS[chunk])
    whole = jax.jit(linear_attention.recurrent)(*part(0, 30))
    first, memory = form(*part(0, cut))
    second, memory = form(*part(cut, 30), memory)
    there = np.arange(30) < lengths[:, None]
    np.testing.assert_allclose(
        jnp.concatenate([first, second], axis=1)[there], whole[0][there], rtol=0, atol=1e-5
    )
    for found, wanted in zip(memory, whole[1], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_keys_that_repeat_do_not_blow_up_the_chunked_form():
    inputs = drawn_inputs(np.random.default_rng(0), 1, 64)
    same = jnp.broadcast_to(inputs.k[:, :1], inputs.k.shape)
    inputs = inputs._replace(k=same, beta=jnp.ones_like(inputs.beta))
    inputs = inputs._replace(log_decay=jnp.zeros_like(inputs.log_decay))
    segments = jnp.ones((1, 64), jnp.int32)
    forms = chunked, linear_attention.recurrent
    found, wanted = (jax.jit(form)(inputs, segments)[0] for form in forms)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


# --- decoding


def layout_of(policy: Policy, stacked: bool):
    made = dataclasses.replace(engine_tuning("cpu", "auto", 1), stacked=stacked)
    return _layout(policy, None, made)


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("qwen3_next", True), ("qwen3_5_text", False), ("qwen3_5_moe_text", True)],
)
def test_decoding_token_by_token_equals_the_forward_of_transformers(name, stacked):
    policy, params = drawn_model(name)
    golden = arrays(name)
    tokens, mask = golden["right_tokens"], golden["right_mask"]
    lengths = np.array([1, 7, 5], np.int32)
    verbs = Verbs(policy, layout_of(policy, stacked))
    found = decoded_log_probs(verbs, params, tokens, lengths)
    wanted = np.zeros_like(found)
    wanted[mask > 0] = jax.nn.log_softmax(golden["right_logits"])
    compared = (mask > 0) & (np.arange(tokens.shape[1]) >= lengths[:, None])
    np.testing.assert_allclose(found[compared], wanted[compared], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "on_mesh", [False, pytest.param(True, marks=pytest.mark.long)], ids=["one device", "mesh"]
)
def test_sampled_log_probs_are_those_of_one_forward_while_slots_refill_and_shrink(
    on_mesh, monkeypatch
):
    policy, params = tiny_hybrid()
    if on_mesh:
        monkeypatch.setattr(tuning, "MAX_UNROLLED_ON_CPU", 0)
        mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
        policy = dataclasses.replace(policy, mesh=mesh)
    engine = Engine(policy, max_prompt_length=16, max_response_length=24, num_slots=16)
    assert engine.verbs.layout.stacked == on_mesh
    prompts = [[3 + i, *range(4, 4 + 2 * i)] for i in range(8)]
    sampling = SamplingParams(n=4, max_tokens=24, stop_token_ids=(1, 2, 9, 17, 33))
    out = engine.generate(params, prompts, sampling, jax.random.key(1))
    assert out.stats["resizes"] > 0 or on_mesh
    rows = [(p, c) for p, group in zip(prompts, out.groups) for c in group]
    tokens = np.zeros((len(rows), 40), np.int32)
    mask = np.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(rows):
        whole = np.concatenate([prompt, completion.tokens])
        tokens[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    single, weights = tiny_hybrid()
    scored = np.asarray(single.log_probs(weights, tokens, mask))
    for row, (prompt, completion) in enumerate(rows):
        part = scored[row, len(prompt) : len(prompt) + len(completion.tokens)]
        np.testing.assert_allclose(completion.log_probs, part, rtol=0, atol=1e-4)


@pytest.mark.long
def test_requests_that_come_and_go_are_sampled_from_their_own_states():
    policy, params = tiny_hybrid()
    engine = Engine(
        policy,
        max_prompt_length=40,
        max_response_length=40,
        num_slots=16,
        gpu_memory_utilization=0.5,
    )
    batch, rng = ContinuousBatch(engine, params), np.random.default_rng(0)
    tokens, log_probs = collections.defaultdict(list), collections.defaultdict(list)

    def step():
        for new in batch.step():
            tokens[new.sample] += new.tokens.tolist()
            log_probs[new.sample] += new.log_probs.tolist()

    for i in range(5):
        prompt = rng.integers(3, 64, int(rng.integers(2, 36))).tolist()
        batch.submit(prompt, SamplingParams(n=2 + i % 2, max_tokens=10 + 7 * i), seed=i)
        step()
    while batch.busy:
        step()
    batch.close()
    assert len(tokens) == 12
    for sample, completion in tokens.items():
        prompt = list(sample.request.prompt)
        whole = np.zeros((1, 80), np.int32)
        end = len(prompt) + len(completion)
        whole[0, :end] = prompt + completion
        mask = (np.arange(80) < end).astype(np.int32)[None]
        scored = np.asarray(policy.log_probs(params, whole, mask))[0, len(prompt) : end]
        np.testing.assert_allclose(log_probs[sample], scored, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "on_mesh", [False, pytest.param(True, marks=pytest.mark.long)], ids=["one device", "mesh"]
)
def test_turns_go_on_from_the_states_that_they_ended_with(on_mesh, monkeypatch):
    policy, params = tiny_hybrid()
    if on_mesh:
        monkeypatch.setattr(tuning, "MAX_UNROLLED_ON_CPU", 0)
        mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
        policy = dataclasses.replace(policy, mesh=mesh)
    # Stop strings end turns within a dispatch, and memory holds few rows beside those of the slots.
    detokenize = lambda ids: "".join(chr(65 + i) for i in ids)  # noqa: E731
    engine = engine_of(policy, num_slots=4, detokenize=detokenize)
    row = 32 + engine.plan.row_tokens
    engine.plan = dataclasses.replace(engine.plan, most_tokens=16 * row)
    sampling = dataclasses.replace(SAMPLING, stop_token_ids=(), stop=tuple("DHLPTXbfj"))
    prompts, key, found = prompts_of(5, 12), jax.random.key(5), {}
    for keeps in (False, True):
        with engine.session(params, sampling, key, keeps_turns=keeps) as session:
            found[keeps] = converse(session, prompts, delay=late), session.stats
    (again, stats_again), (kept, stats) = found[False], found[True]
    assert max(script.num_turns for script in kept) == MOST_TURNS
    assert sum(script.reason == "stop" for script in kept) > 0
    assert stats["prefill_tokens"] < stats_again["prefill_tokens"]
    assert stats["evicted"] > 0
    assert_scripts_agree(again, kept)
    single, weights = tiny_hybrid()
    for place, script in enumerate(kept):
        wanted = whole_forward(single, weights, prompts[place // SAMPLING.n], script.tokens)
        sampled = np.array(script.log_probs) != 0
        np.testing.assert_allclose(
            np.array(script.log_probs)[sampled], wanted[sampled], rtol=0, atol=1e-4
        )


def test_prompts_are_read_in_pieces_from_state_to_state():
    policy, params = tiny_hybrid()
    prompts, found = prompts_of(5, 18, 33, 60), []
    for size in (0, 16):
        engine = Engine(
            policy,
            max_prompt_length=64,
            max_response_length=8,
            num_slots=8,
            prefill_chunk_size=size,
        )
        sampling = SamplingParams(n=2, max_tokens=8)
        out = engine.generate(params, prompts, sampling, jax.random.key(3))
        found.append(out)
    assert found[1].stats["prefill_calls"] == 1 + 2 + 2 + 4
    for ours, theirs in zip(found[1].flat, found[0].flat, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-4)


def test_prompts_with_large_states_are_prefilled_a_few_at_a_time(monkeypatch):
    policy, params = tiny_hybrid()
    engine = Engine(policy, max_prompt_length=16, max_response_length=8, num_slots=8)
    state = engine.verbs.layout.linear.row_bytes()
    sampling, prompts = SamplingParams(max_tokens=4), [[3, 4 + i, 5] for i in range(8)]
    found = {}
    for most in (8, 2):
        monkeypatch.setattr(kv_cache, "STATE_BYTES", most * state)
        found[most] = engine.generate(params, prompts, sampling, jax.random.key(2))
    assert [found[most].stats["prefill_calls"] for most in (8, 2)] == [1, 4]
    for ours, theirs in zip(found[2].flat, found[8].flat, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_the_memory_of_states_is_planned():
    policy, _ = tiny_hybrid()
    layout = layout_of(policy, stacked=False)
    sizes = jax.eval_shape(lambda: layout.linear.zeros(3))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sizes))
    assert held == 3 * layout.linear.row_bytes()
    settings = {
        "max_prompt_length": 16,
        "max_response_length": 16,
        "group_size": 2,
        "most_slots": 64,
        "multiple": 1,
        "splits": 1,
        "stages": 1,
        "shrinks": False,
    }
    budget = 200 * layout.token_bytes() + 40 * layout.linear.row_bytes()
    with_states = cache_plan.plan(layout, budget=budget, **settings)
    without = dataclasses.replace(layout, linear=None)
    assert with_states.num_slots < cache_plan.plan(without, budget=budget, **settings).num_slots
    with pytest.raises(ValueError, match="for the state of linear attention"):
        cache_plan.plan(layout, budget=layout.linear.row_bytes(), **settings)


# --- packed streams


def ragged(seed: int = 0, P: int = 4, G: int = 3) -> Sequences:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 64, n).tolist() for n in (1, 2, 9, 14)[:P]]
    groups = [
        [
            Completion.sampled(*rng.integers(3, 64, (2, int(rng.integers(1, 14)))), "stop")
            for _ in range(G)
        ]
        for _ in prompts
    ]
    return Sequences(prompts, groups)


def whole_rows(policy, params, sequences: Sequences):
    """Log-probs of completions, each alone behind its prompt."""
    found = []
    for prompt, group in zip(sequences.prompts, sequences.completions):
        for completion in group:
            tokens = np.zeros((1, 32), np.int32)
            whole = np.concatenate([prompt, completion.tokens])
            tokens[0, : len(whole)] = whole
            mask = (np.arange(32) < len(whole)).astype(np.int32)[None]
            scored = np.asarray(policy.log_probs(params, tokens, mask))[0]
            found.append(scored[len(prompt) : len(whole)])
    return found


@pytest.mark.parametrize(
    ("model", "share_prompts"),
    [
        (tiny_hybrid, True),
        (functools.partial(drawn_model, "qwen3_next"), True),
        pytest.param(tiny_hybrid, False, marks=pytest.mark.long),
    ],
    ids=["shared prompts", "a mixture", "prompts of their own"],
)
def test_completions_of_a_packed_stream_go_on_from_the_state_of_their_prompt(model, share_prompts):
    policy, params = model()
    sequences = ragged()
    cut = packing.Packing(
        sequences, completions_per_micro=4, tile=8, starts=8, share_prompts=share_prompts
    )
    log_probs, _ = make_log_probs(policy)(params, cut.batch(sequences))
    found = [x for group in cut.unpacked(np.asarray(log_probs)) for x in group]
    for a, b in zip(found, whole_rows(policy, params, sequences), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


def test_packed_streams_on_a_mesh_that_recompute_give_the_gradient_of_padded_rows():
    policy, params = tiny_hybrid()
    batch, _ = tiny.batch(P=4, G=2)
    packing_of = packing.Packing(batch.sequences(), tile=8, starts=8, num_shards=2)
    packed = packing_of.batch(batch.sequences())
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    again = dataclasses.replace(policy, gradient_checkpointing="full", mesh=mesh)

    def summed(params, policy, batch, trained):
        log_probs, entropy = make_log_probs(policy)(params, batch)
        return jnp.where(trained, log_probs + 0.3 * entropy, 0.0).sum()

    rows, streams = jax.tree.map(jnp.asarray, (batch, packed))
    gradient = jax.jit(jax.grad(summed), static_argnums=1, compiler_options=QUICK)
    wanted = gradient(params, policy, rows, rows.completion_mask_PGT > 0)
    split = jax.device_put(params, again.shardings(params))
    found = parameters.by_path(gradient(split, again, streams, streams.trained))
    for name, leaf in parameters.by_path(wanted).items():
        largest = np.max(np.abs(leaf))
        assert largest > 0, name
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=3e-5 * largest, err_msg=name)


def test_streams_whose_segments_start_anywhere_are_refused():
    policy, params = tiny_hybrid()
    sequences = ragged()
    with pytest.raises(ValueError, match="needs segments that start at multiples of 8 places"):
        make_log_probs(policy)(params, packing.pack(sequences, tile=8))


# --- adapters, and folders with vision


@pytest.mark.parametrize(
    "name", [pytest.param("qwen3_next", marks=pytest.mark.long), "qwen3_5_text"]
)
def test_adapters_come_back_from_their_folder_and_are_merged(name, tmp_path):
    policy, params = adapted(name, "all-linear")
    wanted = {"qwen3_next": {"linear_qkvz"}, "qwen3_5_text": {"linear_q", "linear_v"}}[name]
    assert wanted | {"gated_q", "linear_out"} < set(policy.lora.targets)
    base = dataclasses.replace(policy, lora=None), lora.without_adapters(params)
    assert_adapters_come_back(base, (policy, params), tmp_path, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_a_qwen35_with_vision_and_further_layers_gives_its_language_model(name, tmp_path):
    expected, wanted = drawn_model(f"{name}_text")
    tensors = {
        name.replace("model.", "model.language_model.", 1): drawn(name, leaf.hf_shape)
        for leaf in leaves(expected.config, wanted)
        for name in leaf.hf_names
    }
    if name == "qwen3_5_moe":
        tensors = with_experts_together(tensors)
    for other in ("model.visual.blocks.0.attn.qkv.weight", "mtp.layers.0.mlp.up_proj.weight"):
        tensors[other] = np.zeros((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    text = {k: v for k, v in config_of(f"{name}_text").items() if k != "architectures"}
    config = {"model_type": name, "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy, params = Policy.from_pretrained(tmp_path)
    assert policy.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


def with_experts_together(tensors):
    """The tensors with those of the experts of a layer in one, as the published folders have it."""
    experts = {name for name in tensors if ".experts." in name}
    together = {name: x for name, x in tensors.items() if name not in experts}
    for layer in {name.split("experts.")[0] + "experts." for name in experts}:
        gate, up, down = (
            np.stack([tensors[f"{layer}{e}.{kind}_proj.weight"] for e in range(4)])
            for kind in ("gate", "up", "down")
        )
        together[f"{layer}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        together[f"{layer}down_proj"] = down
    return together


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # [E, D, 2 I], as some other families have it.
        (lambda x: x.swapaxes(1, 2), r"wrong shape: .*gate_proj.weight \(wanted \[8, 32\], got"),
        (lambda x: x[:3], "unexpected tensors: .*experts.gate_up_proj"),
        # So many experts, each of no byte, that nobody counts them to the end.
        (lambda x: np.zeros((1 << 40, 16, 0), np.float32), "unexpected tensors: .*gate_up_proj"),
    ],
    ids=["turned", "fewer", "endless"],
)
def test_experts_together_whose_shape_is_another_are_told(change, message, tmp_path):
    policy, params = drawn_model("qwen3_5_moe_text")
    tensors = {
        name: drawn(name, leaf.hf_shape)
        for leaf in leaves(policy.config, params)
        for name in leaf.hf_names
    }
    tensors = with_experts_together(tensors)
    changed = {name: change(x).copy() for name, x in tensors.items() if "gate_up" in name}
    save_file(tensors | changed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3_5_moe_text")))
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(tmp_path)


# --- the whole road


RUN = (
    *TINY_RUN,
    "--config.sft.steps=0",
    "--config.data.max_response_length=4",
    "--config.trainer.total_training_steps=2",
    "--config.trainer.save_freq=1",
    "--config.trainer.test_freq=0",
    "--config.actor_rollout_ref.model.hf_config="
    + repr(TINY | {"architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 512}),
)


@pytest.mark.long
def test_a_hybrid_trains_goes_on_where_it_stopped_and_trains_alike_on_eight_devices(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    run = (*RUN, *with_reward(tmp_path / "reward.py"))
    train(parse(*run), tmp_path / "whole")
    interrupt(parse(*run), tmp_path / "run", 1)
    train(parse(*run), tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole", 2)
    losses = [v for row in scalars(tmp_path / "run") for k, v in row.items() if k.endswith("/loss")]
    assert len(losses) == 2
    assert np.isfinite(losses).all()

    adpo_jax.train(parse(*run, "--config.mesh.tensor=2"), tmp_path / "eight")
    for eight, one in zip(scalars(tmp_path / "eight"), scalars(tmp_path / "whole"), strict=True):
        for row in (eight, one):
            row.pop("update/padding_frac", None)  # four streams are padded to the longest
        assert eight == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_numbers_that_differentiation_sets_apart_from_a_product_of_experts_count_for_nothing():
    @jax.jit
    def grouped_product():
        return jnp.arange(3.0)

    traced = jax.jit(lambda x: x + grouped_product()).trace(jnp.zeros(3))
    assert flops.traced_flops(traced, 1) == 0
