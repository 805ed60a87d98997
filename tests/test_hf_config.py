"""config.json -> ModelConfig: published configs, both spellings of the rope, and refusals."""

import ast
import contextlib
import importlib
import json
import re

import jax
import numpy as np
import published
import pytest
from golden_models import FAMILIES as GOLDEN_FAMILIES
from golden_models import MIXTURES, config_of
from transformers import AutoConfig

from adpo_jax import Policy
from adpo_jax.hf import folders
from adpo_jax.hf.config import language_config, model_config
from adpo_jax.hf.families import FAMILIES, WRAPPERS
from adpo_jax.model.rope import Rope
from adpo_jax.run import loading
from adpo_jax.serve import __main__ as serve

QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def architecture(hf_config):
    return model_config(language_config(hf_config))


@pytest.mark.parametrize(
    ("hf_config", "num_params"),
    [
        (QWEN25_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
        (LLAMA32_1B, 1_235_814_400),
        (MISTRAL_7B, 7_241_732_096),
        (GEMMA2_2B, 2_614_341_888),
        (GEMMA3_1B, 999_885_952),
        (GEMMA3_4B, 3_880_263_168),
    ],
    ids=["qwen2.5-0.5b", "qwen3-0.6b", "llama3.2-1b", "mistral-7b", "gemma2-2b", "g3-1b", "g3-4b"],
)
def test_published_configs_give_the_published_number_of_parameters(hf_config, num_params):
    params = Policy.abstract_from_config(hf_config).abstract_params()
    assert sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params)) == num_params


def test_windows_of_each_family():
    assert set(architecture(QWEN25_05B).windows) == {None}
    assert set(architecture(LLAMA32_1B).windows) == {None}
    assert set(architecture(MISTRAL_7B).windows) == {4096}
    assert set(architecture({**MISTRAL_7B, "sliding_window": None}).windows) == {None}
    assert architecture(GEMMA2_2B).windows == (4096, None) * 13
    assert architecture(GEMMA3_1B).windows[:7] == (512,) * 5 + (None, 512)
    sliding = {**QWEN25_05B, "use_sliding_window": True}
    assert architecture(sliding).windows == (None,) * 21 + (32768,) * 3


def test_gemma3_has_a_rope_for_local_and_one_for_global_layers():
    config = architecture(GEMMA3_4B)
    assert [config.ropes[i] for i in config.layer_ropes[4:7]] == [
        Rope(theta=10_000.0),
        Rope(theta=1_000_000.0, kind="linear", factor=8.0),
        Rope(theta=10_000.0),
    ]


def test_gemma_scales_queries_by_its_own_scalar_and_others_by_the_head():
    assert architecture({**GEMMA2_2B, "query_pre_attn_scalar": 144}).attention_scale == 1 / 12
    assert architecture(LLAMA32_1B).attention_scale == 1 / 8


@pytest.mark.parametrize("hf_config", [LLAMA32_1B, GEMMA3_1B, GEMMA3_4B])
def test_both_spellings_of_the_rope_mean_the_same(hf_config):
    old = language_config(hf_config)
    new = {
        key: value
        for key, value in old.items()
        if key not in ("rope_theta", "rope_scaling", "rope_local_base_freq")
    }
    if hf_config["model_type"] == "llama":
        new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    else:
        new["rope_parameters"] = {
            "full_attention": {"rope_theta": 1_000_000.0, **(old.get("rope_scaling") or {})},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    assert model_config(new) == model_config(old)


def test_the_first_spelling_of_the_rope_type_is_read():
    scaling = {"type": "linear", "factor": 2.0}
    assert architecture({**MISTRAL_7B, "rope_scaling": scaling}).ropes == (
        Rope(theta=10_000.0, kind="linear", factor=2.0),
    )


@pytest.mark.parametrize(
    ("given", "scaling", "wanted"),
    [
        (None, None, None),
        (64, None, 64),
        (64, {"rope_type": "yarn", "factor": 4.0}, 256),
        (256, {"rope_type": "yarn", "original_max_position_embeddings": 64}, 256),
        (64, {"rope_type": "longrope", "short_factor": [1] * 32, "long_factor": [2] * 32}, 64),
    ],
)
def test_positions_are_those_that_the_rope_is_stretched_to(given, scaling, wanted, caplog):
    changes = {"max_position_embeddings": given or 0, "rope_scaling": scaling}
    policy = Policy.abstract_from_config(LLAMA32_1B | changes)
    assert policy.positions == wanted
    most = wanted or 4096
    limits = ("--max-prompt-length", str(most // 2), "--max-response-length")
    for response, fits in ((most // 2, True), (most // 2 + 1, False)):
        a = serve.arguments(["--model", "m", *limits, str(response)])
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="positions of"):
            serve._lengths(a, policy)
        caplog.clear()
        loading._tell_of_positions(policy, most // 2 + response)
        assert (caplog.text == "") == (fits or wanted is None)


def test_yarn_fills_in_what_transformers_fills_in():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 8192}
    (rope,) = architecture({**QWEN3_06B, "rope_scaling": scaling}).ropes
    assert rope.factor == 5.0
    assert rope.original_length == 8192
    assert rope.attention_factor == pytest.approx(0.1 * np.log(5.0) + 1)
    (rope,) = architecture({**QWEN3_06B, "rope_scaling": {"type": "yarn", "factor": 4.0}}).ropes
    assert rope.original_length == 40960


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type):
    """What config.json leaves out must mean the same on both sides."""
    module = importlib.import_module(
        f"transformers.models.{model_type.removesuffix('_text')}.configuration_"
        f"{model_type.removesuffix('_text')}"
    )
    name = FAMILIES[model_type].architecture.replace("ForCausalLM", "")
    theirs = getattr(module, name + ("TextConfig" if model_type.endswith("_text") else "Config"))
    # Ropes and layer types are derived, and not plain fields, in transformers.
    derived = {"layer_types", "rope_theta", "rope_scaling", "rope_parameters"}
    derived |= {"rope_local_base_freq", "sliding_window_pattern"}
    experts = {"num_experts", "num_local_experts", "n_routed_experts"}
    fields = theirs.__dataclass_fields__
    ours = FAMILIES[model_type].defaults
    given = {key: ours[key] for key in ours.keys() & fields.keys() - derived - experts}
    numbers = [fields[key].default for key in experts & fields.keys()]
    if FAMILIES[model_type].num_experts:
        assert numbers == [FAMILIES[model_type].num_experts]
    assert given == {key: fields[key].default for key in given}
    assert len(given) >= 8


@pytest.mark.parametrize("name", GOLDEN_FAMILIES)
def test_the_dict_of_a_transformers_config_means_the_same_as_its_json(name):
    hf_config = AutoConfig.for_model(**config_of(name)).to_dict()
    assert len(hf_config) > len(config_of(name))
    assert architecture(hf_config) == architecture(config_of(name))


@pytest.mark.parametrize("name", GOLDEN_FAMILIES)
def test_random_models_of_every_family_have_every_parameter(name):
    policy = Policy.abstract_from_config(config_of(name))
    names = set(policy.abstract_params()["layers"])
    assert {"attn_norm", "q", "k", "v", "o", "mlp_norm"} <= names
    mlp, experts = {"gate", "up", "down"}, {"experts_gate", "experts_up", "experts_down"}
    mixed = mlp | experts if name == "glm4_moe" else experts
    assert names & (mlp | experts) == (mixed if name in MIXTURES else mlp)
    assert ("shared_router" in names) == (name == "qwen2_moe")
    assert ("q_bias" in names) == (name in ("qwen2", "qwen2_moe", "llama_bias_tied", "glm4_moe"))
    assert ("o_bias" in names) == ("down_bias" in names) == (name == "llama_bias_tied")
    assert ("q_norm" in names) == (name in ("qwen3", "qwen3_moe", "gemma3_text", "glm4_moe"))
    assert ("q_norm_all" in names) == (name == "olmoe")
    assert ("attn_post_norm" in names) == name.startswith("gemma")


REFUSED = {
    "model_type 'gpt2' is not supported; supported: qwen2, qwen3, llama": {"model_type": "gpt2"},
    "model_type None is not supported": {"model_type": None},
    "architectures .'LlamaForSequenceClassification'.*supported: LlamaForCausalLM": {
        "architectures": ["LlamaForSequenceClassification"]
    },
    "rope type 'dynamic' is not supported; supported: default, linear, llama3, yarn, longrope": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0}
    },
    "rope type 'none' is not supported": {"rope_parameters": {"rope_type": "none"}},
    "rope type 'longrope' needs long_factor, short_factor": {
        "rope_parameters": {"rope_type": "longrope"}
    },
    "the rope needs short_factor as a list of numbers above 0; given .1, 'x'.": {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1, "x"], "long_factor": [1]}
    },
    "the rope has 2 factors in short_factor or long_factor; 32 are needed": {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}
    },
    "rope settings that are not implemented: llama_4_scaling_beta": {
        "rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 0.1}
    },
    "rope type 'llama3' needs factor, high_freq_factor, low_freq_factor": {
        "rope_scaling": {"rope_type": "llama3"}
    },
    "rope type 'yarn' needs original_max_position_embeddings, or else max_.* above 0; given 0": {
        "rope_scaling": {"rope_type": "yarn"},
        "max_position_embeddings": 0,
    },
    "rope type 'yarn' needs factor, or else max_position_embeddings, .* above 0; given 0": {
        "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8},
        "max_position_embeddings": 0,
    },
    "rope type 'yarn' needs rope_theta as a number above 1; given 1.0": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "rope_theta": 1,
    },
    "the rope needs beta_slow as a number above 0; given 1e-320": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_slow": 1e-320},
    },
    "rope settings that are not implemented: mrope_section": {
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}
    },
    "partial_rotary_factor of the rope is not supported": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}
    },
    "rope settings that are not implemented: full_attention": {
        "rope_parameters": {"full_attention": {}}
    },
    "partial_rotary_factor = 0.25 is not supported; supported: 1.0": {
        "partial_rotary_factor": 0.25
    },
    "attention_dropout = 0.1 is not supported; supported: 0.0": {"attention_dropout": 0.1},
    "is_causal = False is not supported": {"is_causal": False},
    "not implemented .*quantization_config = {'bits': 4}": {"quantization_config": {"bits": 4}},
    "not implemented .*sliding_window = 512": {"sliding_window": 512},
    "rope_scaling .*kind='llama3'.* and rope_parameters .*kind='default'.* disagree": {
        "rope_parameters": {"rope_type": "default"}
    },
    "activation 'relu2' is not supported; supported: silu": {"hidden_act": "relu2"},
    "num_hidden_layers as a positive integer; given None": {"num_hidden_layers": None},
    "vocab_size as a positive integer; given 32.5": {"vocab_size": 32.5},
    "head_dim 5 is odd": {"head_dim": 5},
    "num_heads 32 is not a multiple of num_kv_heads 5": {"num_key_value_heads": 5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_implemented_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        architecture({**LLAMA32_1B, **REFUSED[message]})


REFUSED_IN_OTHERS = {
    "not implemented .*use_bidirectional_attention = True": (
        GEMMA3_1B,
        {"use_bidirectional_attention": True},
    ),
    # transformers reads it and does not apply it.
    "not implemented .*attn_logit_softcapping = 50.0": (
        GEMMA3_1B,
        {"attn_logit_softcapping": 50.0},
    ),
    "one entry for full_attention and one for sliding_attention; given .'rope_type'": (
        GEMMA3_1B,
        {"rope_parameters": {"rope_type": "default"}},
    ),
    "layer types .'chunked_attention'. are not supported": (
        QWEN3_06B,
        {"layer_types": ["chunked_attention"] * 28},
    ),
    "3 layer_types for num_hidden_layers = 28": (
        QWEN3_06B,
        {"layer_types": ["full_attention"] * 3},
    ),
    "has sliding_attention, but use_sliding_window is false": (
        QWEN3_06B,
        {"layer_types": ["sliding_attention"] * 28},
    ),
    "sliding_window as a positive integer; given None": (GEMMA2_2B, {"sliding_window": None}),
    "architectures .'Gemma3Model'": (GEMMA3_4B, {"architectures": ["Gemma3Model"]}),
}


@pytest.mark.parametrize("message", REFUSED_IN_OTHERS)
def test_settings_of_other_families_are_refused_by_name(message):
    hf_config, changes = REFUSED_IN_OTHERS[message]
    with pytest.raises(ValueError, match=message):
        architecture({**hf_config, **changes})


def test_what_changes_nothing_is_accepted_and_a_null_reaches_into_a_wrapper():
    def read(name, **changes):
        hf_config = published.ALL[name][0]
        if "text_config" in hf_config:
            changes = {"text_config": changes}
        return model_config(language_config(folders.overridden(hf_config, changes)))

    llama4 = read("llama4-scout")
    assert read("llama4-scout", attn_temperature_tuning=4) == llama4
    assert read("llama4-scout", attn_temperature_tuning=0) != llama4
    for name, changes in (
        ("qwen3-30b-a3b", {"use_qk_norm": True}),
        ("qwen3.5-27b", {"output_gate_type": "swish"}),
        ("granite3.3-8b", {"attention_dropout": 0.1}),
    ):
        assert read(name, **changes) == read(name)
    config = {"model_type": "gemma3", "text_config": {"more": 1, "less": 2}, "less": 3}
    without = folders.overridden(config, {"less": None})
    assert without == {"model_type": "gemma3", "text_config": {"more": 1}}
    scaling = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.878}
    with pytest.raises(ValueError, match=r"attn_factor.* as in {'rope_scaling': {'attn_factor'"):
        read("qwen3-30b-a3b", rope_scaling=scaling)


@pytest.mark.parametrize("keep_nulls", [False, True])
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_overrides_of_a_wrapper_change_its_language_model(model_type, keep_nulls):
    text = {
        "model_type": WRAPPERS[model_type].text_types[0],
        "num_hidden_layers": 8,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    }
    config = {"model_type": model_type, "text_config": text, "vision_config": {"depth": 2}}
    override = {
        "num_hidden_layers": 4,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
        "text_config": {"rms_norm_eps": 1e-3},
        "tie_word_embeddings": True,
        "eos_token_id": [3],
        "dtype": "bfloat16",
        "architectures": None,
    }
    found = folders.overridden(config, override, keep_nulls=keep_nulls)
    outer = ("tie_word_embeddings", "eos_token_id", "dtype")
    wanted = {**text, "num_hidden_layers": 4, "rms_norm_eps": 1e-3} | {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e7}
    }
    if keep_nulls:
        wanted["sliding_window"] = None
    else:
        del wanted["sliding_window"]
    nulls = {"architectures": None} if keep_nulls else {}
    assert found == {**config, "text_config": wanted} | {k: override[k] for k in outer} | nulls
    of_text = language_config(found)
    assert {k: v for k, v in of_text.items() if k in wanted} == wanted
    assert {k: of_text[k] for k in outer} == {k: override[k] for k in outer}
    # Another model_type makes it another model.
    other = {"model_type": "llama", "num_hidden_layers": 2}
    assert folders.overridden(config, other, keep_nulls=keep_nulls)["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("qwen3-30b-a3b", {"rope_parameters": {"new_setting": 3}}),
        ("qwen3-30b-a3b", {"rope_scaling": {"new_setting": 3}}),
        ("qwen3.5-27b", {"rope_parameters": {"new_setting": 3}}),
        ("qwen3.5-27b", {"use_qk_clip": True}),
        ("gemma4-31b", {"rope_parameters": {"full_attention": {"new_setting": 3}}}),
        ("gemma4-31b", {"rope_parameters": {"sliding_attention": {"new_setting": 3}}}),
    ],
)
def test_what_a_refusal_says_passes_a_setting_over(name, setting):
    config = published.ALL[name][0]
    changed = folders.overridden(config, setting)
    with pytest.raises(ValueError, match="can be taken out of its config.json") as refused:
        model_config(language_config(changed))
    in_python, in_json = re.findall(r"as in ({.*?})(?:, or|$)", str(refused.value))
    cure = ast.literal_eval(in_python)
    assert json.loads(in_json) == cure
    cured = model_config(language_config(folders.overridden(changed, cure)))
    assert cured == model_config(language_config(config))


def test_switches_that_are_off_and_private_notes_are_accepted():
    extra = {"use_qk_clip": False, "moe_layers": [], "_name_or_path": "x", "temperature": 0.7}
    assert architecture({**LLAMA32_1B, **extra}) == architecture(LLAMA32_1B)
