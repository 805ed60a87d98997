"""Llama 4, whose queries see a chunk of positions, on every road besides `test_families.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_models import config_of
from test_engine import assert_log_probs_agree, engine_of
from test_policy import QUICK
from test_turns import (
    assert_turns_agree,
    policy_of,
    prompts_of,
)
from test_turns import engine_of as engine_of_turns

from adpo_jax import Policy, SamplingParams, update
from adpo_jax.engine.kernels import DECODING, PREFILL
from adpo_jax.hf.config import language_config
from adpo_jax.model.attention_kernels import ROWS, STREAMS
from adpo_jax.model.rope import Rope
from adpo_jax.update.packing import Packing

CHUNKED = {
    "qk_norm": False,
    "chunks": (6, None),
    "qk_unit_norm": True,
    "rope_interleaved": True,
    "ropes": (Rope(), Rope(kind="none", query_beta=0.3, query_length=4, query_offset=1)),
    "layer_ropes": (0, 1),
}


@pytest.fixture(scope="module")
def model():
    policy = Policy(dataclasses.replace(policy_of().config, **CHUNKED))
    return policy, policy.init(jax.random.key(0))


def test_samples_in_refilled_slots_see_their_chunk_alone(model):
    policy, params = model
    prompts = prompts_of(5, 1, 12, 20)
    sampling = SamplingParams(n=2, max_tokens=18, stop_token_ids=(3, 4, 5))
    out = engine_of(policy, num_slots=4).generate(params, prompts, sampling, jax.random.key(0))
    assert_log_probs_agree(policy, params, prompts, out)


@pytest.mark.long
def test_log_probs_over_turns_are_those_of_one_forward(model):
    policy, params = model
    prompts = prompts_of(5, 12)
    assert assert_turns_agree(engine_of_turns(policy), policy, params, prompts, 1e-4) >= 2


def test_packed_streams_give_the_gradient_of_padded_rows(model):
    policy, params = model
    batch, _ = tiny.batch(P=2, prompt=7)
    packed = Packing(batch.sequences(), tile=4).batch(batch.sequences())

    def summed(params, policy, batch, trained):
        log_probs, _ = update.make_log_probs(policy)(params, batch)
        return jnp.where(trained, log_probs, 0.0).sum()

    rows, streams = jax.tree.map(jnp.asarray, (batch, packed))
    gradient = jax.jit(jax.grad(summed), static_argnums=1, compiler_options=QUICK)
    wanted = gradient(params, policy, rows, rows.completion_mask_PGT > 0)
    found = gradient(params, policy, streams, streams.trained)
    unchunked = dataclasses.replace(policy, config=dataclasses.replace(policy.config, chunks=()))
    other = gradient(params, unchunked, streams, streams.trained)
    for name, leaf in wanted["layers"].items():
        largest = np.max(np.abs(leaf))
        np.testing.assert_allclose(found["layers"][name], leaf, rtol=0, atol=2e-5 * largest)
        assert np.max(np.abs(other["layers"][name] - leaf)) > 1e-3 * largest, name


def test_kernels_that_know_no_chunks_are_not_chosen_and_those_of_decoding_are(model):
    policy, _ = model
    settings = dataclasses.replace(policy, dtype="bfloat16").attention_settings
    for use in (ROWS, STREAMS, PREFILL):
        for name in {"pallas_tpu", "pallas_gpu"} & use.table.keys():
            assert "has no attention to chunks" in use.table[name].obstacle(settings), (use, name)
    layout = engine_of(policy).verbs.layout
    wide = dataclasses.replace(layout, stacked=True, transposed_keys=False, head_dim=128)
    assert DECODING.table["pallas_tpu"].obstacle(wide) == ""


def test_wrong_settings_are_refused_and_an_empty_list_of_layers_without_rope_means_every_fourth():
    dense = config_of("llama4_text")
    for message, changes in {
        "interleave_moe_layer_step as a positive integer; given 0": {
            "moe_layers": None,
            "interleave_moe_layer_step": 0,
        },
        r"moe_layers as a list of numbers of its 3 layers, from 0, or null; given \[3\]": {
            "moe_layers": [3]
        },
        "num_experts_per_tok = 17, more than its 16 experts": {
            "moe_layers": [1],
            "num_experts_per_tok": 17,
        },
        "not implemented .*router_bias = True": {"router_bias": True},
        "attention_chunk_size as a positive integer; given 0": {"attention_chunk_size": 0},
        "floor_scale as a positive integer; given 0": {"floor_scale": 0},
        "not implemented .*attn_sinks = 4": {"attn_sinks": 4},
        "layer types .'sliding_attention'. are not supported": {
            "layer_types": ["sliding_attention"] * 3
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            Policy.abstract_from_config({**dense, **changes})
    derived = {"no_rope_layers": [], "layer_types": None, "num_hidden_layers": 4}
    config = Policy.abstract_from_config(dense | derived | {"no_rope_layer_interval": 4}).config
    assert config.chunks == (4, 4, 4, None)
    assert [config.ropes[i].kind for i in config.layer_ropes] == [*["default"] * 3, "none"]
    text = {k: v for k, v in dense.items() if k != "architectures"}
    outer = {"model_type": "llama4", "text_config": text, "tie_word_embeddings": False}
    assert language_config(outer)["architectures"] == ["Llama4ForCausalLM"]
