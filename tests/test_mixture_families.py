"""Mixtures beside MLPs and in every other layer, and experts of which one tensor holds all."""

import dataclasses
import json

import jax
import numpy as np
import published
import pytest
from golden_models import arrays, assert_adapters_come_back, config_of, drawn_model, write_drawn
from test_policy import QUICK, assert_golden

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices import sharding
from adpo_jax.model import layer_stacks
from adpo_jax.model.lora import Lora, parse_targets
from adpo_jax.model.mixture import ROUTED
from adpo_jax.policy import adapters
from adpo_jax.records import Sequences
from adpo_jax.update import make_log_probs, packing

NAMES = ("gemma4_moe", "llama4_maverick")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_eight_devices_equals_transformers(name, tmp_path):
    write_drawn(config_of(name), tmp_path)
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    policy, params = Policy.from_pretrained(tmp_path, mesh=mesh)
    L, E, D, f = params["layers"]["experts_up"].shape
    shard = params["layers"]["experts_up"].addressable_shards[0]
    assert shard.data.shape == (L, E // 2, D // 2, f // 2)
    golden = arrays(name)
    # A row more, so that the batch divides.
    tokens, mask = (
        np.concatenate([golden[f"left_{key}"]] + [golden[f"left_{key}"][:1]])
        for key in ("tokens", "mask")
    )
    assert_golden(name, "left", np.asarray(policy.logits(params, tokens, mask))[:3])


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.long), NAMES[1]])
def test_the_update_takes_the_experts_that_the_sampler_took_in_the_layers_that_have_them(name):
    policy, params = drawn_model(name)
    engine = Engine(policy, max_prompt_length=8, max_response_length=12, num_slots=8)
    prompts = [[5, 9, 11, 30, 2, 41], [8]]
    sampling = SamplingParams(n=2, max_tokens=12, routed_experts=True, prompt_experts=True)
    groups = engine.generate(params, prompts, sampling, jax.random.key(1)).groups
    c = policy.config
    assert groups[0][0].experts.shape == (len(groups[0][0]), c.num_mixtures, 2)
    # Those of the prompt are those of a forward over it, and completions share them.
    assert groups[0][0].prompt_experts is groups[0][1].prompt_experts
    _, _, extras = policy(params, np.array([prompts[0]]), np.arange(6)[None])
    of_prompt = np.moveaxis(np.asarray(extras[ROUTED])[:, 0], 0, 1)
    np.testing.assert_array_equal(groups[0][0].prompt_experts, of_prompt[:-1])
    np.testing.assert_array_equal(groups[0][0].experts[0], of_prompt[-1])
    assert groups[1][0].prompt_experts.shape == (0, c.num_mixtures, 2)
    packed = packing.pack(Sequences(prompts, groups))

    score = jax.jit(make_log_probs(policy), compiler_options=QUICK)
    found, trained = np.asarray(score(params, packed)[0]), packed.trained
    np.testing.assert_allclose(
        found[trained], packed.log_probs["sampler"][trained], rtol=0, atol=1e-4
    )
    # Other experts give others, so that the choice above was the sampler's.
    for name in ("experts", "prompt_experts"):
        other = [
            [dataclasses.replace(x, **{name: (getattr(x, name) + 1) % 6}) for x in g]
            for g in groups
        ]
        moved = np.asarray(score(params, packing.pack(Sequences(prompts, other)))[0])
        assert np.abs(moved - found)[trained].max() > 0.05, name


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.long) for name in NAMES)]
)
def test_adapters_of_experts_that_share_a_tensor_come_back_and_are_merged(name, tmp_path):
    policy, params = drawn_model(name)
    targets = parse_targets("q_proj,gate_up_proj,down_proj")
    ours, tree = policy.with_adapters(params, Lora(2, 4.0, targets), jax.random.key(0))
    L, E, _, f = tree["layers"]["experts_up_lora_b"].shape
    assert tree["layers"]["experts_down_lora_a"].shape == (L, E, f, 2)
    rng = np.random.default_rng(0)
    tree["layers"] |= {
        n: x + 0.3 * rng.normal(size=x.shape).astype(np.float32)
        for n, x in tree["layers"].items()
        if "lora" in n
    }
    assert_adapters_come_back((policy, params), (ours, tree), tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert [n.rpartition(".")[2] for n in config["target_parameters"]] == [
        "gate_up_proj",
        "down_proj",
    ]
    assert config["rank_pattern"] == {"gate_up_proj": 4}

    # Those of one matrix of three are zero for the one beside it.
    alone, tree = policy.with_adapters(
        params, Lora(2, 4.0, parse_targets("gate_proj")), jax.random.key(0)
    )
    adapters.save(tmp_path / "alone", alone, tree, base_model="x")
    found, _ = adapters.load(policy, params, tmp_path / "alone")
    assert {"experts_gate", "experts_up"} <= set(found.lora.targets)
    assert "experts_down" not in found.lora.targets

    config["target_parameters"] = "down_proj"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="target_parameters is a list of names, or null; given 'd"):
        adapters.load(policy, params, tmp_path / "adapter")


def test_the_published_models_have_mixtures_where_they_say():
    gemma, scout, maverick = (
        Policy.abstract_from_config(published.ALL[name][0]).config
        for name in ("gemma4-26b-a4b", "llama4-scout", "llama4-maverick")
    )
    assert (gemma.intermediate_size, gemma.mixture.expert_size) == (2112, 704)
    assert (gemma.mixture.num_experts, gemma.mixture.chosen, gemma.num_mixtures) == (128, 8, 30)
    assert (scout.mixture.num_experts, scout.num_mixtures) == (16, 48)
    assert (maverick.mixture.num_experts, maverick.mixture_layers) == (128, tuple(range(1, 48, 2)))
    assert maverick.intermediate_size == 16384
    assert maverick.mixture.shared_size == maverick.mixture.expert_size == 8192
    assert (scout.qk_unit_norm, maverick.qk_unit_norm) == (True, False)
    # One scan of 24 steps, each of an MLP and a mixture.
    assert layer_stacks.stretches(maverick) == [layer_stacks.Stretch(range(48), 2)]
    assert layer_stacks.stretches(scout) == [layer_stacks.Stretch(range(48), 1)]
    assert [stretch.period for stretch in layer_stacks.stretches(gemma)] == [6]
