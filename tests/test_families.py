"""Families whose weights the tests draw: logits, decoding, round trips and published configs."""

import json

import jax
import numpy as np
import pytest
from golden_models import DRAWN, arrays, config_of, drawn, drawn_model
from safetensors.numpy import load_file
from test_policy import TOLERANCE, assert_golden, decoded_log_probs

from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs


@pytest.mark.parametrize("name", DRAWN)
def test_logits_equal_those_of_transformers_for_padded_batches(name):
    policy, params = drawn_model(name)
    golden = arrays(name)
    for batch in ("right", "left"):
        logits = policy.logits(params, golden[f"{batch}_tokens"], golden[f"{batch}_mask"])
        assert_golden(name, batch, logits)


@pytest.mark.parametrize("name", DRAWN)
def test_decoding_token_by_token_equals_the_forward_of_transformers(name):
    policy, params = drawn_model(name)
    golden, c = arrays(name), policy.config
    tokens, mask = golden["right_tokens"], golden["right_mask"]
    layout = CacheLayout(c.num_layers, c.num_kv_heads, c.head_dim, policy.dtype, True, False)
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
