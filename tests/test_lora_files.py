"""Adapters to and from folders, and whole runs with them."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from golden_models import GOLDEN, arrays, model
from parsing import parse
from safetensors.numpy import load_file, save_file
from test_lora import adapted
from test_train import TINY, on_one_device, reward_file, scalars, train, with_reward  # noqa: F401

from adpo_jax import Policy, pretrained, update
from adpo_jax.devices import sharding
from adpo_jax.model import lora
from adpo_jax.model.lora import Lora
from adpo_jax.policy import adapters
from adpo_jax.rewards import RewardError
from adpo_jax.run import config_checks, setup

TOKENS = np.random.default_rng(0).integers(0, 32, (3, 9)).astype(np.int32)


@pytest.fixture(scope="module")
def trained():
    return adapted()


@pytest.fixture
def folder(trained, tmp_path):
    adapters.save(tmp_path / "adapter", *trained, base_model="some/model")
    return tmp_path / "adapter"


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapters_come_back_from_their_folder(trained, folder):
    policy, params = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    a, _ = lora.adapter_of(params, "o")
    np.testing.assert_array_equal(tensors[name], np.asarray(a)[1].reshape(32, 2).T)

    plain = dataclasses.replace(policy, lora=None)
    found, loaded = adapters.load(plain, lora.without_adapters(params), folder)
    assert found == policy
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    spread = dataclasses.replace(plain, mesh=sharding.make_mesh(2, 2, 2))
    layout = jax.tree.map(lambda s: s.sharding, spread.abstract_params())
    base = jax.device_put(lora.without_adapters(params), layout)
    found, loaded = adapters.load(spread, base, folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded["layers"]["q_lora_b"].sharding == (
        found.abstract_params()["layers"]["q_lora_b"].sharding
    )


def test_the_export_has_the_adapters_in_its_weights(trained, tmp_path):
    policy, params = trained
    policy.save_pretrained(tmp_path / "merged", params)
    plain, loaded = Policy.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(
        plain.logits(loaded, TOKENS), policy.logits(params, TOKENS), rtol=0, atol=1e-5
    )
    assert plain.lora is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, supported is None"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', supported is 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"layer_replication": [[0, 1], [0, 1]]}, r"layer_replication is \[\[0, 1\], \[0, 1\]\]"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config is .*, supported is None; write that there"),
        ({"of_a_later_peft": 1}, "of_a_later_peft is 1, supported is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', .* base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga', supported is True"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern is"),
        ({"r": 3}, r"q_proj.lora_A.weight has shape \(2, 16\), wanted \(3, 16\)"),
    ],
)
def test_a_folder_that_means_another_model_is_refused(trained, folder, changes, message):
    policy, params = trained
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=message):
        adapters.load(policy, lora.without_adapters(params), folder)


def test_a_second_set_of_adapters_does_not_take_the_place_of_the_first(trained, folder):
    policy, params = trained
    for again in (
        lambda: policy.with_adapters(params, Lora(2, 4.0, ("q",)), jax.random.key(0)),
        lambda: adapters.load(policy, params, folder),
    ):
        with pytest.raises(ValueError, match=r"have adapters already: give the base .* or merge"):
            again()


def test_what_peft_notes_of_a_plain_adapter_is_passed_over(folder):
    """All keys that peft 0.21 writes, and initialisations that leave the base's weights alone."""
    off = (
        "alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules "
        "kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config "
        "megatron_config modules_to_save monteclora_config revision target_parameters "
        "trainable_token_indices use_bdlora velora_config"
    )
    false = "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora use_rslora"
    noted = {"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16}
    noted |= {"peft_version": "0.21.2", "alpha_pattern": {}, "rank_pattern": {}}
    expected = adapters.find(folder)
    rewrite(folder, **dict.fromkeys(off.split()), **dict.fromkeys(false.split(), False), **noted)
    for start in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        rewrite(folder, init_lora_weights=start)
        assert adapters.find(folder) == expected


def test_tensors_that_do_not_fit_are_named(trained, folder):
    policy, params = trained
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    nan = {**tensors, name: tensors[name] * np.nan}
    extra = {**tensors, "base_model.model.lm_head.lora_A.weight": tensors[name]}
    short = {key: value for key, value in tensors.items() if key != name}
    for content, message in (
        (nan, "NaN or infinity in an adapter of up_lora_b"),
        (extra, "tensors that are not used, lm_head.lora_A.weight for one"),
        (short, r"layers.1.mlp.up_proj.lora_B.weight has shape None, wanted \(32, 2\)"),
    ):
        save_file(content, path)
        with pytest.raises(ValueError, match=message):
            adapters.load(policy, lora.without_adapters(params), folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        adapters.find(folder)


def test_keys_of_the_config_without_effect_are_refused():
    model = "--config.actor_rollout_ref.model"
    for overrides, message in (
        (
            [f"{model}.lora_alpha=8.0"],
            "lora_alpha: no effect without actor_rollout_ref.model.lora_rank",
        ),
        ([f"{model}.lora_adapter_path=a", f"{model}.lora_rank=8"], "no effect beside"),
        ([f"{model}.lora_rank=-1"], "model.lora_rank is at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config_checks.finalized(parse(*overrides))


LORA_RUN = (
    *TINY,
    "--config.actor_rollout_ref.model.lora_rank=2",
    "--config.actor_rollout_ref.actor.optim.lr=0.05",
    "--config.anchor.mode=ema",
)


@pytest.mark.usefixtures("reward_file")
def test_a_run_trains_adapters_on_a_base_that_stays_and_goes_on_where_it_stopped(tmp_path):
    config = parse(*LORA_RUN, *with_reward(tmp_path / "reward.py"))
    train(config, tmp_path / "whole")
    rows = scalars(tmp_path / "whole")
    assert len({row["reward/mean"] for row in rows[1:]}) > 1
    assert len({row["adpo/loss"] for row in rows[1:]}) > 1  # the anchor lags behind

    (tmp_path / "broken").touch()
    with pytest.raises(RewardError, match="the disk is gone"):
        train(config, tmp_path / "run")
    (tmp_path / "broken").unlink()
    train(config, tmp_path / "run")
    assert scalars(tmp_path / "run") == rows
    files = ("export/model.safetensors", "adapter/adapter_model.safetensors")
    for file in files:
        one, other = (tmp_path / name / file for name in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()

    # The export and the adapter beside the first weights are one policy, and not the first one.
    parts = on_one_device(config_checks.finalized(config))
    base = lora.without_adapters(parts.initial_params())
    merged, params = Policy.from_pretrained(tmp_path / "whole" / "export")
    policy, adapted = adapters.load(merged, base, tmp_path / "whole" / "adapter")
    logits = merged.logits(params, TOKENS)
    np.testing.assert_allclose(policy.logits(adapted, TOKENS), logits, rtol=0, atol=1e-4)
    assert np.abs(merged.logits(base, TOKENS) - logits).max() > 1e-2
    # So is the checkpoint of the last iteration, which holds adapters and reads the weights again.
    read = pretrained.load(tmp_path / "whole" / "checkpoints")
    np.testing.assert_allclose(read.policy.logits(read.params, TOKENS), logits, rtol=0, atol=1e-4)
    # Adapters that came from a folder are those that the run noted, wherever that is by now.
    began = config_checks.finalized(config).copy_and_resolve_references()
    began.actor_rollout_ref.model.lora_adapter_path = str(tmp_path / "gone")
    path = tmp_path / "whole" / "config.json"
    written = json.loads(path.read_text())
    written["contents"] |= {"adapters": setup.contents(began, parts)["adapters"]}
    written["actor_rollout_ref"]["model"] |= {
        "lora_adapter_path": str(tmp_path / "gone"),
        "lora_rank": 0,
        "lora_alpha": 1.0,
    }
    path.write_text(json.dumps(written))
    again = pretrained.load(tmp_path / "whole" / "checkpoints")
    np.testing.assert_array_equal(
        again.policy.logits(again.params, TOKENS), read.policy.logits(read.params, TOKENS)
    )
    # It is merged into no other weights.
    written["trainer"]["seed"] += 1
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="not those that the adapters of this checkpoint"):
        pretrained.load(tmp_path / "whole" / "checkpoints")


def test_a_checkpoint_holds_the_adapters_and_goes_on_with_no_other_weights():
    policy, params = adapted()
    state = update.init_state(policy, params, optax.adam(0.1))
    assert jax.tree.map(np.shape, state.saved.params) == jax.tree.map(
        np.shape, lora.split(params)[0]
    )
    jax.tree.map(np.testing.assert_array_equal, state.saved.with_frozen(params), state)
    other = {**params, "embed": params["embed"].at[3, 1].add(1e-3)}
    with pytest.raises(ValueError, match="not those that the adapters of this checkpoint"):
        state.saved.with_frozen(other)


# peft reads a name that transformers 6 takes away.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.torch
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "llama"])
def test_peft_gives_the_same_logits(name, tmp_path):
    """Both ways: it reads what we write, and we read what it writes."""
    torch = pytest.importorskip("torch", reason="needs the extra [torch]")
    peft = pytest.importorskip("peft", reason="needs the extra [torch]")
    from transformers import AutoModelForCausalLM

    def base():
        return AutoModelForCausalLM.from_pretrained(
            GOLDEN / name, attn_implementation="eager", dtype=torch.float32
        )

    def logits(theirs):
        with torch.no_grad():
            return theirs.eval()(torch.from_numpy(tokens)).logits.numpy()

    tokens = arrays(name)["full_tokens"].astype(np.int64)
    policy, params = model(name)
    some = Lora(3, 12.0, ("q", "o", "up", "down"))
    ours, tree = policy.with_adapters(params, some, jax.random.key(4))
    trained, frozen = lora.split(tree)
    tree = lora.join(jax.tree.map(lambda x: x + 0.05, trained), frozen)
    adapters.save(tmp_path / "ours", ours, tree, base_model=str(GOLDEN / name))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    expected = ours.logits(tree, tokens)
    np.testing.assert_allclose(logits(theirs), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - policy.logits(params, tokens)).max() > 0.1

    ours.save_pretrained(tmp_path / "merged", tree)
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(logits(merged), expected, rtol=0, atol=1e-4)

    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=2, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1
    )
    theirs = peft.get_peft_model(base(), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    read = adapters.load(policy, params, tmp_path / "theirs")
    np.testing.assert_allclose(read[0].logits(read[1], tokens), logits(theirs), rtol=0, atol=1e-4)
