"""Live comparison with the PyTorch models of transformers; needs the extra [torch].

The golden files pin one transformers version; here the installed one is asked, with new weights,
and reads what we write.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import FAMILIES, MIXTURES, VARIANTS, config_of, model

from adpo_jax import Policy

torch = pytest.importorskip("torch", reason="needs the extra [torch]")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_golden  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def assert_same_logits(policy, params, theirs) -> None:
    arrays = make_golden.batches(seed=123)
    for name, wanted in make_golden.logits_of(theirs, arrays).items():
        batch = name.removesuffix("_logits")
        mask = arrays[f"{batch}_mask"]
        logits = policy.logits(params, arrays[f"{batch}_tokens"], mask)
        np.testing.assert_allclose(np.asarray(logits)[mask > 0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES + VARIANTS)
def test_a_new_model_of_transformers_gives_the_same_logits_here(name, tmp_path):
    settings = {k: v for k, v in make_golden.MODELS[name].items() if k != "weights_of"}
    theirs = make_golden.make_model(settings, seed=1000)
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert_same_logits(*Policy.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_export_gives_the_same_logits_in_transformers(name, tmp_path):
    policy, params = model(name)
    params = jax.tree.map(lambda p: p * 1.1, params)
    policy.save_pretrained(tmp_path / "out", params, max_shard_size=20_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert_same_logits(policy, params, theirs.eval())


@pytest.mark.parametrize("name", MIXTURES)
def test_the_gradient_of_a_mixture_is_that_of_torch(name, tmp_path):
    settings = make_golden.MODELS[name]
    theirs = make_golden.make_model(settings, seed=1001)
    theirs.save_pretrained(tmp_path / "model")
    arrays = make_golden.batches(seed=124)
    tokens, mask = arrays["right_tokens"], arrays["right_mask"]
    real = (mask[:, 1:] * mask[:, :-1]) > 0
    logits = theirs(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask)).logits
    scored = torch.log_softmax(logits[:, :-1], -1)
    scored = torch.gather(scored, -1, torch.tensor(tokens[:, 1:, None]).long())[..., 0]
    (scored * torch.tensor(real)).sum().backward()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.grad)
        for buffer in theirs.buffers():
            buffer.zero_()
    theirs.save_pretrained(tmp_path / "gradient")

    policy, params = Policy.from_pretrained(tmp_path / "model")
    _, wanted = Policy.from_pretrained(tmp_path / "gradient")
    found = jax.grad(lambda p: policy.log_probs(p, tokens, mask).sum())(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_a_gemma3_with_vision_gives_its_text_logits(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {k: v for k, v in config_of("gemma3_text").items() if k != "dtype"}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = Gemma3ForConditionalGeneration(config).float().eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    assert_same_logits(*Policy.from_pretrained(tmp_path), theirs)
