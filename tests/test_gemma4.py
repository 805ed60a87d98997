"""Gemma 4, whose layers have two shapes, on every road besides those of `test_families.py`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import tiny
from golden_models import arrays, assert_adapters_come_back, config_of, drawn, drawn_model
from safetensors.numpy import save_file
from test_families import adapted, architecture
from test_policy import QUICK, TOLERANCE, decoded_log_probs
from test_turns import (
    assert_turns_agree,
    engine_of,
    prompts_of,
)

from adpo_jax import Policy, update
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine import tuning
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs
from adpo_jax.hf.config import language_config
from adpo_jax.hf.tensors import leaves
from adpo_jax.model import lora, parameters
from adpo_jax.model.attention_kernels import ROWS, STREAMS
from adpo_jax.update.packing import Packing


@pytest.mark.parametrize(
    ("name", "stacked"),
    [("gemma4_text", True), ("gemma4_large", False), ("gemma4_moe", True)],
    ids=str,
)
def test_decoding_token_by_token_equals_the_forward_of_transformers(name, stacked):
    policy, params = drawn_model(name)
    golden, c = arrays(name), policy.config
    tokens, mask = golden["right_tokens"], golden["right_mask"]
    layout = CacheLayout(0, 0, 0, policy.dtype, stacked, not stacked, c.kinds)
    own = sum(c.has_own_keys(i) for i in range(c.num_layers))
    assert sum(layers for layers, _, _ in c.kinds) == own
    lengths = np.array([1, 7, 5], np.int32)
    found = decoded_log_probs(Verbs(policy, layout), params, tokens, lengths)
    wanted = np.zeros_like(found)
    wanted[mask > 0] = jax.nn.log_softmax(golden["right_logits"])
    compared = (mask > 0) & (np.arange(tokens.shape[1]) >= lengths[:, None])
    np.testing.assert_allclose(found[compared], wanted[compared], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def smallest():
    """Three layers of random weights: one with a window, one without, and one that shares keys."""
    config = config_of("gemma4_text") | {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "per_layer_config": {"1": {"head_dim": 16}, "2": {"head_dim": 16}},
        "initializer_range": 0.3,
    }
    return Policy.from_config(config, jax.random.key(0))


@pytest.mark.parametrize(
    "stacked", [pytest.param(True, marks=pytest.mark.long), False], ids=["on a mesh", "one by one"]
)
def test_log_probs_over_turns_are_those_of_one_forward(stacked, smallest, monkeypatch):
    policy, params = smallest
    mesh = None
    if stacked:
        monkeypatch.setattr(tuning, "MAX_UNROLLED_ON_CPU", 0)
        mesh = make_mesh(data=1, fsdp=1, tensor=2, devices=jax.devices()[:2])
    engine, prompts = engine_of(dataclasses.replace(policy, mesh=mesh)), prompts_of(5, 12)
    assert engine.verbs.layout.stacked == stacked
    assert assert_turns_agree(engine, policy, params, prompts, 1e-3) >= 2


def test_packed_streams_that_recompute_give_the_gradient_of_padded_rows(smallest):
    policy, params = smallest
    batch, _ = tiny.batch(P=2)
    packed = Packing(batch.sequences(), tile=4).batch(batch.sequences())
    again = dataclasses.replace(policy, gradient_checkpointing="full")

    def summed(params, policy, batch, trained):
        log_probs, entropy = update.make_log_probs(policy)(params, batch)
        return jnp.where(trained, log_probs + 0.3 * entropy, 0.0).sum()

    rows, streams = jax.tree.map(jnp.asarray, (batch, packed))
    gradient = jax.jit(jax.grad(summed), static_argnums=1, compiler_options=QUICK)
    wanted = gradient(params, policy, rows, rows.completion_mask_PGT > 0)
    found = gradient(params, again, streams, streams.trained)
    for name, leaf in parameters.by_path(wanted).items():
        largest = np.max(np.abs(leaf))
        other = parameters.by_path(found)[name]
        np.testing.assert_allclose(other, leaf, rtol=0, atol=3e-5 * largest, err_msg=str(name))
    # The scalars of a checkpoint are no parameters there, and stay as they are.
    assert not np.any(wanted["layers"].pop("layer_scalar"))
    assert all(np.any(g) for g in jax.tree.leaves(wanted))


def test_adapters_of_layers_of_two_shapes_come_back_and_are_merged(tmp_path):
    policy, params = adapted("gemma4_text", "all-linear")
    assert {"q", "global_q", "wide_gate", "per_layer_gate"} < set(policy.lora.targets)
    base = dataclasses.replace(policy, lora=None), lora.without_adapters(params)
    assert_adapters_come_back(base, (policy, params), tmp_path, atol=1e-3)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "rank_pattern" not in config


def test_a_gemma4_with_vision_and_sound_gives_its_language_model(tmp_path):
    """Published files hold keys and values of layers that use those of others, too."""
    expected, wanted = drawn_model("gemma4_text")
    names = {
        name: leaf.hf_shape for leaf in leaves(expected.config, wanted) for name in leaf.hf_names
    }
    tensors = {
        name.replace("model.", "model.language_model.", 1): drawn(name, shape)
        for name, shape in names.items()
    }
    unused = ("vision_tower.x", "embed_vision.x", "audio_tower.x", "embed_audio.x")
    keys = [f"language_model.layers.4.self_attn.{n}.weight" for n in ("k_proj", "v_proj", "k_norm")]
    tensors |= {f"model.{name}": np.ones(3, np.float32) for name in (*unused, *keys)}
    save_file(tensors, tmp_path / "model.safetensors")
    text = {k: v for k, v in config_of("gemma4_text").items() if k != "architectures"}
    outer = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 3},
        "audio_config": {"hidden_size": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    policy, params = Policy.from_pretrained(tmp_path)
    assert policy.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    assert policy.hf_config["architectures"] == ["Gemma4ForCausalLM"]

    # Those of layers that do have keys of their own are missed.
    del tensors["model.language_model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing tensors: model.layers.2.self_attn.k_proj.weight"
    ):
        Policy.from_pretrained(tmp_path)


def test_the_two_spellings_of_the_shapes_of_global_layers_mean_the_same():
    config = language_config(published.GEMMA4_31B)
    sizes = {"head_dim": 512, "num_key_value_heads": 4}
    listed = {str(i): sizes for i in range(5, 60, 6)}
    old = ("global_head_dim", "num_global_key_value_heads")
    written = {k: v for k, v in config.items() if k not in old} | {"per_layer_config": listed}
    found = Policy.abstract_from_config(written).config
    assert found == Policy.abstract_from_config(published.GEMMA4_31B).config
    assert found.kinds == ((50, 16, 256), (10, 4, 512))
    # transformers 5.24 puts zeros in front of the numbers of models with more than ten layers.
    padded = {f"{int(i):02}": sizes for i in listed}
    assert Policy.abstract_from_config({**written, "per_layer_config": padded}).config == found
    for wrong in (
        {**listed, "0": sizes},
        {**listed, "05": sizes},
        {**padded, "+5": padded["05"]},
        {"\u0665" if i == "5" else i: sizes for i in listed},
        {"": sizes},
        {},
        {**listed, "5": {"head_dim": 256}},
        {**listed, "5": {**sizes, "sliding_window": 3}},
        [sizes],
    ):
        with pytest.raises(ValueError, match="per_layer_config"):
            Policy.abstract_from_config({**written, "per_layer_config": wrong})


def test_published_layers_share_keys_and_have_the_mlps_of_their_kind():
    e2b = architecture("gemma4-e2b")
    assert e2b.kinds == ((12, 1, 256), (3, 1, 512))
    assert (e2b.shared_kv_layers, e2b.shared_mlp_size, e2b.per_layer_size) == (20, 12288, 256)
    # Layers 15 and 19 read what layers 13 and 14 have.
    assert [e2b.layer_info.place[i] for i in (13, 15, 14, 19)] == [11, 11, 2, 2]
    distant, near = e2b.ropes
    frequencies, _ = distant.frequencies(512)
    assert (frequencies > 0).sum() == 64
    assert frequencies[1] == pytest.approx(1e6 ** (-1 / 256))
    assert near.kind == "default"
    # A kernel that cannot run the wide heads is not chosen for the narrow ones either.
    settings = Policy(e2b, dtype="bfloat16").attention_settings
    assert "given 256" in STREAMS.table["pallas_gpu"].obstacle(settings)
    assert "given 512" in ROWS.table["cudnn"].obstacle(settings)
    assert STREAMS.table["pallas_tpu"].obstacle(settings) == ""


REFUSED = {
    "num_experts as a positive integer; given None": ("gemma4-31b", {"enable_moe_block": True}),
    "top_k_experts = 129, more than its 128 experts": ("gemma4-26b-a4b", {"top_k_experts": 129}),
    "moe_intermediate_size = 704 and expert_intermediate_size = 8": (
        "gemma4-26b-a4b",
        {"expert_intermediate_size": 8},
    ),
    "not implemented .*num_shared_experts = 1": ("gemma4-26b-a4b", {"num_shared_experts": 1}),
    "use_bidirectional_attention = 'all' is not supported": (
        "gemma4-31b",
        {"use_bidirectional_attention": "all"},
    ),
    "not implemented .*attn_sinks = 4": ("gemma4-e2b", {"attn_sinks": 4}),
    "not implemented .*attention_bias = True": ("gemma4-e2b", {"attention_bias": True}),
    "leaves no layer with keys of its own for full_attention": (
        "gemma4-e2b",
        {"num_kv_shared_layers": 31},
    ),
    "num_kv_shared_layers as an integer of at least 0; given -1": (
        "gemma4-e2b",
        {"num_kv_shared_layers": -1},
    ),
    "hidden_size_per_layer_input as a positive integer; given -6": (
        "gemma4-e2b",
        {"hidden_size_per_layer_input": -6},
    ),
    "global_head_dim as a positive integer; given 'x'": ("gemma4-e2b", {"global_head_dim": "x"}),
    "the last of layer_types is 'sliding_attention'": (
        "gemma4-e2b",
        {"layer_types": ["full_attention"] + ["sliding_attention"] * 34},
    ),
    "partial_rotary_factor of the rope is not supported": (
        "gemma4-e2b",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "partial_rotary_factor": 0.25}
            }
        },
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_implemented_are_refused_by_name(message):
    name, changes = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        architecture(name, **changes)
