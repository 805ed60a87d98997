"""Live comparison of the families of `DRAWN` with transformers; needs the extra [torch]."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import DRAWN, config_of, drawn_model, write_drawn

from adpo_jax import Policy
from adpo_jax.model import lora
from adpo_jax.model.lora import Lora, parse_targets
from adpo_jax.policy import adapters

torch = pytest.importorskip("torch", reason="needs the extra [torch]")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

from test_policy_torch import assert_same_logits, make_golden  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def read_by_transformers(folder):
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs.eval()


@pytest.mark.parametrize("name", DRAWN)
def test_their_folders_are_read_here_and_ours_there(name, tmp_path):
    theirs = make_golden.make_model(make_golden.DRAWN[name], seed=1000)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    policy, params = Policy.from_pretrained(tmp_path / "theirs")
    assert_same_logits(policy, params, theirs)
    params = jax.tree.map(lambda p: p * 1.1, params)
    policy.save_pretrained(tmp_path / "ours", params, max_shard_size=20_000)
    assert_same_logits(policy, params, read_by_transformers(tmp_path / "ours"))


@pytest.mark.parametrize("name", DRAWN)
def test_gradients_equal_those_of_torch(name, tmp_path):
    policy, params = drawn_model(name)
    batch = make_golden.batches(5, make_golden.FEW_TOKENS, make_golden.FEW_LENGTHS)
    tokens, mask = batch["right_tokens"], batch["right_mask"]
    both = (mask[:, 1:] * mask[:, :-1]).astype(np.float32)
    weights = both * np.cos(np.arange(both.size).reshape(both.shape))

    def ours(params):
        return jnp.sum(policy.log_probs(params, tokens, mask)[:, 1:] * weights)

    gradient = jax.grad(ours)(params)
    policy.save_pretrained(tmp_path / "ours", gradient)
    theirs = make_golden.drawn_model(make_golden.DRAWN[name])
    logits = theirs(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(mask).long().cumsum(1).sub(1).clamp(min=0),
    ).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1)
    taken = log_probs.gather(-1, torch.tensor(tokens[:, 1:, None]).long())[..., 0]
    (taken * torch.tensor(weights)).sum().backward()
    found = dict(read_by_transformers(tmp_path / "ours").named_parameters())
    for key, parameter in theirs.named_parameters():
        wanted = parameter.grad.numpy()
        scale = np.abs(wanted).max()
        assert scale > 0, key
        error = np.abs(found[key].detach().numpy() - wanted).max()
        assert error < 1e-4 * max(scale, 1.0), (key, error, scale)


def test_longrope_within_the_original_length_is_that_of_short_sequences(tmp_path):
    policy, params = drawn_model("phi3")
    theirs = make_golden.drawn_model(make_golden.DRAWN["phi3"])
    tokens = make_golden.batches(6)["full_tokens"][:, :8]
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(tokens).long()).logits.numpy()
    short = policy.for_length(8)
    np.testing.assert_allclose(short.logits(params, tokens), wanted, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(policy.logits(params, tokens)) - wanted).max() > 0.01


@pytest.mark.parametrize("text", ["mistral", "ministral3"])
def test_a_mistral3_with_vision_gives_its_text_logits(text, tmp_path):
    from transformers import AutoConfig, Mistral3Config, Mistral3ForConditionalGeneration

    settings = {k: v for k, v in config_of(text).items() if k not in ("dtype", "architectures")}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 8,
        "patch_size": 4,
    }
    config = Mistral3Config(
        text_config=AutoConfig.for_model(**settings),
        vision_config=AutoConfig.for_model("pixtral", **vision),
        tie_word_embeddings=False,
    )
    theirs = Mistral3ForConditionalGeneration(config).float().eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    policy, params = Policy.from_pretrained(tmp_path)
    assert "head" in params
    batch = make_golden.batches(3, make_golden.FEW_TOKENS, make_golden.FEW_LENGTHS)
    tokens, mask = batch["right_tokens"], batch["right_mask"]
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
        ).logits.numpy()
    found = np.asarray(policy.logits(params, tokens, mask))
    np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], rtol=0, atol=1e-4)


FUSED = {
    "phi3": {"target_modules": "all-linear"},
    "glm4": {"target_modules": "all-linear"},
    # Of all experts of a layer.
    **{
        name: {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }
        for name in ("gpt_oss", "gemma4_moe", "llama4_scout")
    },
}


@pytest.mark.parametrize("name", FUSED)
def test_peft_gives_the_same_logits_with_adapters_of_fused_weights(name, tmp_path):
    """Both ways: it reads what we write, and we read what it writes."""
    peft = pytest.importorskip("peft", reason="needs the extra [torch]")
    write_drawn(config_of(name), tmp_path)

    def logits(theirs):
        with torch.no_grad():
            return theirs.eval()(torch.from_numpy(tokens)).logits.numpy()

    tokens = make_golden.batches(6)["full_tokens"][:, :12].astype(np.int64)
    policy, params = drawn_model(name)
    some = Lora(3, 12.0, parse_targets("q_proj,o_proj,gate_up_proj,down_proj"))
    ours, tree = policy.with_adapters(params, some, jax.random.key(4))
    trained, frozen = lora.split(tree)
    tree = lora.join(jax.tree.map(lambda x: x + 0.05, trained), frozen)
    adapters.save(tmp_path / "ours", ours, tree, base_model=str(tmp_path))
    theirs = peft.PeftModel.from_pretrained(read_by_transformers(tmp_path), tmp_path / "ours")
    expected = ours.logits(tree, tokens)
    np.testing.assert_allclose(logits(theirs), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - policy.logits(params, tokens)).max() > 0.1

    settings = peft.LoraConfig(r=2, lora_alpha=7, init_lora_weights=False, **FUSED[name])
    theirs = peft.get_peft_model(read_by_transformers(tmp_path), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    assert not json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    plain = dataclasses.replace(policy, lora=None)
    read = adapters.load(plain, params, tmp_path / "theirs")
    np.testing.assert_allclose(read[0].logits(read[1], tokens), logits(theirs), rtol=0, atol=1e-4)
