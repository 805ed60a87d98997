"""GLM-4 MoE: layers with an MLP first, groups of experts, layers for further tokens left out."""

import json

import jax
import numpy as np
import published
import pytest
from golden_models import GOLDEN, arrays, assert_adapters_come_back, config_of, model
from safetensors.numpy import load_file, save_file
from test_policy import assert_golden

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices import sharding
from adpo_jax.hf.config import language_config, model_config
from adpo_jax.model import lora
from adpo_jax.model.lora import Lora
from adpo_jax.records import Sequences
from adpo_jax.run import loading
from adpo_jax.update import make_log_probs, packing


def test_layers_that_predict_further_tokens_are_neither_read_nor_written(tmp_path):
    tensors = load_file(GOLDEN / "glm4_moe" / "model.safetensors")
    further = {
        name.replace("layers.2.", "layers.3."): x for name, x in tensors.items() if "s.2." in name
    }
    further["model.layers.3.eh_proj.weight"] = np.zeros((16, 32), np.float32)
    save_file(tensors | further, tmp_path / "model.safetensors")
    config = config_of("glm4_moe") | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy, params = Policy.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, model("glm4_moe")[1])
    policy.save_pretrained(tmp_path / "out", params, dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    # One that says nothing would say 1.
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["num_nextn_predict_layers"] == 0

    tensors["model.layers.2.eh_proj.weight"] = further["model.layers.3.eh_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors: model.layers.2.eh_proj.weight"):
        Policy.from_pretrained(tmp_path)


def architecture(name="glm4.5", **changes):
    return model_config(language_config(published.ALL[name][0] | changes))


def test_the_published_models_choose_experts_and_normalise_queries_as_they_say():
    large, air = architecture(), architecture("glm4.5-air")
    assert (large.mlp_layers, large.qk_norm, large.mixture.scale) == ((0, 1, 2), True, 2.5)
    assert (air.mlp_layers, air.qk_norm, air.mixture.scale) == ((0,), False, 1.0)
    for config in (large, air):
        assert (config.qkv_bias, config.out_bias, config.rope_interleaved) == (True, False, False)
        assert config.ropes[0].dimensions(128) == 64
        assert (config.mixture.router, config.mixture.shared_gate) == ("sigmoid", False)


REFUSED = {
    "first_k_dense_replace as an integer below its 92 layers; given 92": {
        "first_k_dense_replace": 92
    },
    "first_k_dense_replace as a number of at least 0; given -1": {"first_k_dense_replace": -1},
    "n_group = 160 for 160 experts; a group is chosen by its two best": {"n_group": 160},
    "do not divide into 3 groups": {"n_group": 3},
    "1 groups of 5 experts do not hold the 8 experts": {"n_group": 32},
    "n_routed_experts = 160|num_experts = 8 and n_routed_experts = 160": {"num_experts": 8},
    "routed_scaling_factor as a number above 0; given 'x'": {"routed_scaling_factor": "x"},
    "n_shared_experts as a positive integer; given 0": {"n_shared_experts": 0},
    "not implemented .*scoring_func = 'softmax'": {"scoring_func": "softmax"},
    "not implemented .*quantization_config": {"quantization_config": {"quant_method": "fp8"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_supported_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        architecture(**REFUSED[message])


def test_a_model_on_eight_devices_with_an_axis_of_experts_equals_transformers():
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    policy, params = Policy.from_pretrained(GOLDEN / "glm4_moe", mesh=mesh)
    golden = arrays("glm4_moe")
    # A row more, so that the batch divides.
    tokens, mask = (
        np.concatenate([golden[f"left_{name}"]] + [golden[f"left_{name}"][:1]])
        for name in ("tokens", "mask")
    )
    assert_golden("glm4_moe", "left", np.asarray(policy.logits(params, tokens, mask))[:3])


def test_the_update_takes_the_experts_that_the_sampler_took_in_layers_behind_the_first():
    policy, params = model("glm4_moe")
    engine = Engine(policy, max_prompt_length=8, max_response_length=12, num_slots=8)
    prompts = [[5, 9, 11, 30, 2, 41], [8]]
    sampling = SamplingParams(n=2, max_tokens=12, routed_experts=True)
    groups = engine.generate(params, prompts, sampling, jax.random.key(1)).groups
    assert groups[0][0].experts.shape == (len(groups[0][0]), 2, 3)
    packed = packing.pack(Sequences(prompts, groups))
    scored, _ = make_log_probs(policy)(params, packed)
    trained = packed.trained
    np.testing.assert_allclose(
        np.asarray(scored)[trained], packed.log_probs["sampler"][trained], rtol=0, atol=1e-4
    )


def test_the_bias_of_the_router_stays_float32_as_in_transformers(tmp_path, caplog):
    policy, _ = Policy.from_config(config_of("glm4_moe"), jax.random.key(0), dtype="bfloat16")
    bias = np.linspace(3.95, 4.05, 8, dtype=np.float32)  # of which bfloat16 has four values
    params = policy.init(jax.random.key(0))
    dtypes = {name: x.dtype for name, x in params["layers"].items()}
    assert dtypes.pop("experts_bias") == np.float32
    assert set(dtypes.values()) == {np.dtype("bfloat16")}
    params["layers"]["experts_bias"] += bias
    policy.save_pretrained(tmp_path / "out", params, max_shard_size=10_000)
    files = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    size = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]
    assert size["total_size"] == sum(x.nbytes for tensors in files for x in tensors.values())
    # Only a folder whose other weights are float32 is rounded to train adapters beside it.
    loading._tell_of_rounding(tmp_path / "out", "bfloat16")
    assert caplog.text == ""
    policy.save_pretrained(tmp_path / "wide", params, dtype="float32")
    loading._tell_of_rounding(tmp_path / "wide", "bfloat16")
    assert "are float32, and the frozen ones are held in bfloat16" in caplog.text
    _, read = Policy.from_pretrained(tmp_path / "out", dtype="bfloat16")
    np.testing.assert_array_equal(read["layers"]["experts_bias"], [bias, bias])


def test_adapters_of_mlps_experts_and_shared_experts_come_back_from_their_folder(tmp_path, caplog):
    policy, params = model("glm4_moe")
    ours, tree = policy.with_adapters(params, Lora(2, 4.0), jax.random.key(0))
    shapes = {name: x.shape for name, x in tree["layers"].items() if name.endswith("lora_a")}
    assert shapes["gate_lora_a"] == (1, 16, 2)
    assert shapes["experts_gate_lora_a"] == (2, 8, 16, 2)
    assert shapes["shared_down_lora_a"] == (2, 24, 2)
    trained, frozen = lora.split(tree)
    tree = lora.join(jax.tree.map(lambda x: x + 0.05, trained), frozen)
    assert_adapters_come_back((policy, params), (ours, tree), tmp_path)
    assert "the adapters of down_proj, gate_proj, up_proj belong to experts and" in caplog.text
