"""Families whose weights the tests draw: logits, decoding, round trips and published configs."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import published
import pytest
from golden_models import DRAWN, arrays, config_of, drawn, drawn_model
from parsing import parse
from safetensors.numpy import load_file, save_file
from test_policy import TOLERANCE, assert_golden, decoded_log_probs

from adpo_jax import Policy, dry_run, generate
from adpo_jax.data import arithmetic
from adpo_jax.engine import cache_plan
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs
from adpo_jax.hf.config import language_config, model_config
from adpo_jax.model import lora
from adpo_jax.model.lora import Lora, parse_targets
from adpo_jax.policy import adapters
from adpo_jax.records import Prompts
from adpo_jax.run import loading, setup


@pytest.mark.parametrize("name", DRAWN)
def test_logits_equal_those_of_transformers_for_padded_batches(name):
    policy, params = drawn_model(name)
    golden = arrays(name)
    for batch in ("right", "left"):
        logits = policy.logits(params, golden[f"{batch}_tokens"], golden[f"{batch}_mask"])
        assert_golden(name, batch, logits)


# What the other families are made of is decoded in these.
@pytest.mark.parametrize(
    "name",
    [
        *("smollm3", "olmo3", "phi3", "granite", "glm4", "ministral3"),
        *("llama4_text", "llama4_scout", "llama4_maverick", "gpt_oss"),
    ],
)
def test_decoding_token_by_token_equals_the_forward_of_transformers(name):
    policy, params = drawn_model(name)
    golden, c = arrays(name), policy.config
    tokens, mask = golden["right_tokens"], golden["right_mask"]
    # OLMo has no norm before attention, so that its layers are taken apart by other parameters.
    layout = CacheLayout(
        c.num_layers, c.num_kv_heads, c.head_dim, policy.dtype, name != "olmo3", False
    )
    lengths = np.array([1, 7, 5], np.int32)
    found = decoded_log_probs(Verbs(policy, layout), params, tokens, lengths)
    wanted = np.zeros_like(found)
    wanted[mask > 0] = jax.nn.log_softmax(golden["right_logits"])
    compared = (mask > 0) & (np.arange(tokens.shape[1]) >= lengths[:, None])
    np.testing.assert_allclose(found[compared], wanted[compared], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", DRAWN)
def test_load_save_is_bit_identical(name, tmp_path):
    policy, params = drawn_model(name)
    policy.save_pretrained(tmp_path / "out", params, max_shard_size=10_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    written = {key: array for file in files for key, array in load_file(file).items()}
    for key, array in written.items():
        assert array.tobytes() == drawn(key, array.shape).tobytes(), key
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in written.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config | config_of(name) == config


# --- adapters of weights that are one tensor on disk


def adapted(name: str, targets: str):
    policy, params = drawn_model(name)
    some = Lora(2, 6.0, parse_targets(targets))
    policy, params = policy.with_adapters(params, some, jax.random.key(4))
    trained, frozen = lora.split(params)
    return policy, lora.join(jax.tree.map(lambda x: x + 0.05, trained), frozen)


def test_adapters_of_fused_weights_come_back_from_their_folder(tmp_path):
    policy, params = adapted("phi3", "qkv_proj,o_proj,gate_proj,up_proj")
    assert policy.lora.targets == ("q", "k", "v", "o", "gate", "up")
    adapters.save(tmp_path, policy, params, base_model="x", overwrite=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj"]
    assert config["rank_pattern"] == {"qkv_proj": 6, "gate_up_proj": 4}
    assert config["alpha_pattern"] == {"qkv_proj": 18.0, "gate_up_proj": 12.0}

    plain, base = dataclasses.replace(policy, lora=None), lora.without_adapters(params)
    found, loaded = adapters.load(plain, base, tmp_path)
    assert found == policy
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    # One that mixes the weights is no adapter of each of them.
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name] + 1}, path)
    with pytest.raises(ValueError, match=r"qkv_proj.lora_B.weight mixes the 3 weights"):
        adapters.load(plain, base, tmp_path)


def test_an_adapter_of_one_fused_weight_is_zero_for_the_others(tmp_path):
    policy, params = adapted("phi3", "q_proj")
    adapters.save(tmp_path, policy, params, base_model="x", overwrite=True)
    base = lora.without_adapters(params)
    found, loaded = adapters.load(dataclasses.replace(policy, lora=None), base, tmp_path)
    assert found.lora.targets == ("q", "k", "v")
    assert not np.any(loaded["layers"]["k_lora_b"])
    jax.tree.map(
        np.testing.assert_array_equal,
        {k: loaded["layers"][k] for k in params["layers"]},
        params["layers"],
    )


# --- published configs


@pytest.mark.parametrize("name", published.ALL)
def test_published_configs_give_the_published_number_of_parameters(name):
    config, num_params = published.ALL[name]
    params = Policy.abstract_from_config(config).abstract_params()
    assert sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params)) == num_params


def architecture(name: str, max_length: int | None = None, **changes):
    config = language_config(published.ALL[name][0])
    return model_config({**config, **changes}, max_length)


def test_published_layers_have_the_ropes_and_windows_of_their_kind():
    smollm3 = architecture("smollm3-3b")
    assert [smollm3.ropes[i].kind for i in smollm3.layer_ropes[:5]] == [
        *("default",) * 3, "none", "default",
    ]  # fmt: skip
    olmo3 = architecture("olmo3-7b")
    assert olmo3.windows[:4] == (4096, 4096, 4096, None)
    assert [olmo3.ropes[i].kind for i in olmo3.layer_ropes[:4]] == [*("default",) * 3, "yarn"]
    assert architecture("glm4-9b").ropes[0].dimensions(128) == 64
    assert architecture("ministral3-8b").ropes[0].query_length == 16384
    assert architecture("ministral3-8b").ropes[0].attention_factor == 1.0
    assert architecture("seed-oss-36b").out_bias is False


def test_the_longest_sequence_decides_between_the_frequencies_of_longrope():
    factors = published.PHI4_MINI["rope_scaling"]
    for length, chosen in ((None, "long"), (4097, "long"), (4096, "short")):
        (rope,) = architecture("phi4-mini", length).ropes
        assert rope.factors == tuple(factors[f"{chosen}_factor"])
        assert rope.attention_factor == pytest.approx(np.sqrt(1 + np.log(32) / np.log(4096)))
    policy = Policy.abstract_from_config(published.PHI4_MINI)
    assert policy.for_length(4096).config.ropes == architecture("phi4-mini", 4096).ropes
    frequencies, _ = policy.for_length(4096).config.ropes[0].frequencies(128)
    assert frequencies.shape == (48,)


def test_a_reference_and_the_command_generate_have_the_frequencies_of_the_policy(
    tmp_path, monkeypatch
):
    tokenizer = arithmetic.make_tokenizer()
    hf_config = {
        **{"model_type": "phi3", "vocab_size": len(tokenizer), "hidden_size": 32},
        **{"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "rope_theta": 1e4, "eos_token_id": tokenizer.eos_token_id},
        **{"max_position_embeddings": 4096, "original_max_position_embeddings": 512},
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [float(n) for n in range(1, 9)],
        },
    }
    policy, params = Policy.from_config(hf_config, jax.random.key(0))
    policy.save_pretrained(tmp_path, params, tokenizer)
    (long,) = policy.config.ropes
    (short,) = policy.for_length(128).config.ropes
    assert long != short
    path = f"--config.actor_rollout_ref.model.path={tmp_path}"
    pull = "--config.algorithm.beta_reference_kl=0.1"
    config = parse(path, pull, f"--config.actor_rollout_ref.ref.path={tmp_path}")
    config.data.max_prompt_length = config.data.max_response_length = 64
    mesh = setup.make_mesh(config, jax.devices()[:1])
    for length, rope in ((64, short), (512, long)):
        config.eval.max_tokens = length
        fixed = loading.find_fixed(config, loading.find_model(config), mesh)["reference"]
        assert fixed.policy.config.ropes == (rope,)
        parts = types.SimpleNamespace(policy=fixed.policy, fixed={}, cold_start=None)
        parts.train_prompts = Prompts([[1]], {})
        parts.reward_model = types.SimpleNamespace(functions=())
        found = setup.contents(config, parts)
        assert ("within" in found["frequencies"]) == (rope == short)

    class Seen(Exception):
        pass

    def engine(policy, **settings):
        raise Seen(policy.config.ropes)

    monkeypatch.setattr("adpo_jax.engine.engine.Engine", engine)
    for length, rope in ((64, short), (512, long)):
        command = ["--model", str(tmp_path), "--prompt", "Ann", "--max-tokens", str(length)]
        with pytest.raises(Seen) as seen:
            generate.generate(generate.arguments(command))
        assert seen.value.args == ((rope,),)


REFUSED = {
    "not implemented .*clip_qkv = 8.0": ("olmo2-7b", {"clip_qkv": 8.0}),
    "not implemented .*num_local_experts = 8": ("granite3.3-8b", {"num_local_experts": 8}),
    "not implemented .*attention_sink = True": ("glm4-9b", {"attention_sink": True}),
    "partial_rotary_factor as a number of at most 1; given 1.5": (
        "phi4-mini",
        {"partial_rotary_factor": 1.5},
    ),
    "partial_rotary_factor 0.01 of head_dim 128 rotates 1 dimensions": (
        "glm4-9b",
        {"partial_rotary_factor": 0.01},
    ),
    "the rope has 48 factors .* 32 are needed": ("phi4-mini", {"partial_rotary_factor": 0.5}),
    "no_rope_layers as a list of 1 .with a rope. and 0": (
        "smollm3-3b",
        {"no_rope_layers": [2] * 36},
    ),
    "3 no_rope_layers for num_hidden_layers = 36": ("smollm3-3b", {"no_rope_layers": [1, 1, 0]}),
    "no_rope_layer_interval as a positive integer; given 0": (
        "smollm3-3b",
        {"no_rope_layer_interval": 0},
    ),
    "logits_scaling as a number above 0; given 0": ("granite3.3-8b", {"logits_scaling": 0}),
    "rope_parameters of olmo3 has one entry for full_attention": (
        "olmo3-7b",
        {"rope_parameters": {"rope_type": "default"}},
    ),
    "rope_theta = 1000000.0 of olmo3 is read in two ways: .*inside rope_parameters": (
        "olmo3-7b",
        {"rope_theta": 1e6},
    ),
    "not implemented .*use_moe = True": ("phi4-14b", {"use_moe": True}),
    "llama_4_scaling_beta as a number above 0; given 'x'": (
        "ministral3-8b",
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": "x"}},
    ),
    "not implemented .*attention_sinks = 4": ("seed-oss-36b", {"attention_sinks": 4}),
    "not implemented .*linear_attn_bias = True": ("qwen3.5-27b", {"linear_attn_bias": True}),
    "attn_output_gate = False is not supported": ("qwen3.5-27b", {"attn_output_gate": False}),
    "mamba_ssm_dtype = 'bfloat16' is not supported": (
        "qwen3.5-27b",
        {"mamba_ssm_dtype": "bfloat16"},
    ),
    "attention_bias = True is not supported": ("qwen3-next-80b-a3b", {"attention_bias": True}),
    "mlp_only_layers = .0. is not supported": ("qwen3-next-80b-a3b", {"mlp_only_layers": [0]}),
    "linear_num_value_heads = 30, which is not a multiple of linear_num_key_heads = 16": (
        "qwen3-next-80b-a3b",
        {"linear_num_value_heads": 30},
    ),
    "linear_conv_kernel_dim = 17 is not supported; supported: 1 to 16": (
        "qwen3-next-80b-a3b",
        {"linear_conv_kernel_dim": 17},
    ),
    "a model of linear attention alone is not supported": (
        "qwen3-next-80b-a3b",
        {"layer_types": ["linear_attention"] * 48},
    ),
    r"layer types \['sliding_attention'\] are not supported; .*linear_attention": (
        "qwen3-next-80b-a3b",
        {"layer_types": ["sliding_attention"] * 48},
    ),
    "full_attention_interval as a positive integer; given 0": (
        "qwen3-next-80b-a3b",
        {"full_attention_interval": 0},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_implemented_are_refused_by_name(message):
    name, changes = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        architecture(name, **changes)


def test_a_text_config_of_another_family_is_refused():
    config = {**published.MINISTRAL3_8B, "text_config": {"model_type": "mistral4"}}
    with pytest.raises(ValueError, match="'mistral4' in text_config of mistral3 is not supported"):
        language_config(config)


@pytest.fixture
def dry_run_without_compiling(monkeypatch):
    """dry_run.dry_run, which lays out state and cache but traces no program."""
    monkeypatch.setattr(cache_plan, "free_memory", lambda: 10**14)
    monkeypatch.setattr(dry_run, "programs_of", lambda *_, **__: {})
    return dry_run.dry_run


@pytest.mark.parametrize("name", published.ALL)
def test_a_dry_run_plans_a_published_model_by_its_config_alone(
    name, dry_run_without_compiling, tmp_path
):
    config, num_params = published.ALL[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = dry_run_without_compiling(
        parse(f"--config.actor_rollout_ref.model.path={tmp_path}", "--config.mesh.tensor=2")
    )
    assert f"{num_params / 1e9:.3g}B parameters" in report.title
    # Norms, biases and an odd vocabulary are not split by all axes.
    assert report.resident["parameters"] == pytest.approx(4 * num_params / 8, rel=0.03)
    c = Policy.abstract_from_config(config).config
    assert report.rollout["cache"] > 0
    each_kind = (layers * head_dim for layers, _, head_dim in c.kinds)
    assert report.rollout["cache"] % (2 * math.gcd(*each_kind)) == 0
