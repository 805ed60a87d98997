"""gpt-oss: weights in MXFP4, attention sinks on every road, experts with biases."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import tiny
from golden_models import arrays, config_of, drawn, drawn_model, write_drawn
from safetensors.numpy import load_file, save_file
from test_kernels_stream import D, of_layer, stream_of, tensors
from test_mixtures import PRESENT, X, assert_same, info, mixed, value_and_gradient
from test_policy import assert_golden

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices import sharding
from adpo_jax.engine import kernels
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.hf.config import language_config, model_config
from adpo_jax.model import attention_choice, attention_kernels, mixture, parameters
from adpo_jax.model.attention import dot_product_attention, visible
from adpo_jax.model.attention_choice import AttentionFallback
from adpo_jax.model.attention_kernels import ROWS, STREAMS, Settings
from adpo_jax.model.layer_weights import LayerWeights
from adpo_jax.model.model_config import ClampedGate, Mixture
from adpo_jax.records import Sequences
from adpo_jax.update import make_log_probs, packing

# --- weights in MXFP4

EXPERTS = "model.layers.1.mlp.experts."
CONFIG = config_of("gpt_oss") | {
    "quantization_config": published.GPT_OSS_20B["quantization_config"]
}


def four_bits(code: int) -> float:
    """The number of a sign, two bits of exponent and one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def packed(name: str, shape: tuple[int, int, int]):
    """Random blocks and scales for a tensor [E, columns, rows], and its numbers, one at a time."""
    rng = np.random.default_rng(len(name) + shape[2])
    E, columns, rows = shape
    blocks = rng.integers(0, 256, (E, rows, columns // 32, 16)).astype(np.uint8)
    scales = rng.integers(122, 126, (E, rows, columns // 32)).astype(np.uint8)
    numbers = np.zeros(shape, np.float32)
    for e, c, r in np.ndindex(shape):
        byte = int(blocks[e, r, c // 32, c % 32 // 2])
        code = byte >> 4 if c % 2 else byte & 15
        numbers[e, c, r] = four_bits(code) * 2.0 ** (int(scales[e, r, c // 32]) - 127)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, numbers


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder whose experts are in MXFP4, and their numbers by the names of the tensors."""
    folder = tmp_path_factory.mktemp("quantized")
    write_drawn(config_of("gpt_oss"), folder)
    tensors, wanted = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        two, wanted[name] = packed(name, tensors.pop(name).shape)
        tensors |= two
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, wanted


def test_weights_in_mxfp4_are_read_as_bfloat16_and_exported_as_what_they_are(quantized, tmp_path):
    folder, wanted = quantized
    _, params = Policy.from_pretrained(folder, "bfloat16")
    layers = params["layers"]
    both = wanted[f"{EXPERTS}gate_up_proj"]
    np.testing.assert_array_equal(np.float32(layers["experts_gate"][1]), both[..., ::2])
    np.testing.assert_array_equal(np.float32(layers["experts_up"][1]), both[..., 1::2])
    down = wanted[f"{EXPERTS}down_proj"]
    np.testing.assert_array_equal(np.float32(layers["experts_down"][1]), down)

    # Whatever dtype it is trained in.
    wide, same = Policy.from_pretrained(folder, "float32")
    assert same["layers"]["experts_gate"].dtype == np.float32
    wide.save_pretrained(tmp_path / "out", same)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype.name for array in written.values()} == {"bfloat16"}
    for name, numbers in wanted.items():
        np.testing.assert_array_equal(np.float32(written[name]), numbers)
    _, again = Policy.from_pretrained(tmp_path / "out", "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_each_device_reads_its_part_of_weights_in_mxfp4(quantized):
    folder, _ = quantized
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    _, whole = Policy.from_pretrained(folder, "bfloat16")
    _, split = Policy.from_pretrained(folder, "bfloat16", mesh=mesh)
    # Half of the columns is half of a block.
    assert split["layers"]["experts_gate"].addressable_shards[0].data.shape == (3, 2, 16, 32)
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def changed(change, *names):
    """A change of the tensors of bytes of these names."""

    def spoil(tensors):
        tensors |= {name: change(tensors[name]).copy() for name in names}

    return spoil


GATE_UP, DOWN = f"{EXPERTS}gate_up_proj", f"{EXPERTS}down_proj"
SPOILED = {
    "unexpected tensors: .*gate_up_proj_blocks": lambda tensors: tensors.pop(f"{GATE_UP}_scales"),
    r"gate_up_proj in MXFP4 needs blocks .*given \[4, 128, 1, 8\]": changed(
        lambda x: x[..., :8], f"{GATE_UP}_blocks"
    ),
    r"wrong shape: .*down_proj \(wanted \[4, 64, 32\], got \[4, 32, 32\]\)": changed(
        lambda x: x[:, :, :1], f"{DOWN}_blocks", f"{DOWN}_scales"
    ),
    "NaN or infinity: .*layers.1.mlp.experts.down_proj": changed(
        lambda x: np.full_like(x, 255), f"{DOWN}_scales"
    ),
}


@pytest.mark.parametrize("message", SPOILED)
def test_weights_in_mxfp4_that_do_not_fit_are_refused_by_name(message, quantized, tmp_path):
    tensors = load_file(quantized[0] / "model.safetensors")
    SPOILED[message](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(tmp_path)


# --- settings


def architecture(**changes):
    return model_config(language_config(published.GPT_OSS_20B | changes))


def test_the_published_model_has_windows_in_every_other_layer_and_a_rope_that_is_not_rounded():
    config = architecture()
    assert config.windows[:3] == (128, None, 128)
    (rope,) = config.ropes
    assert (rope.kind, rope.theta, rope.factor, rope.truncate) == ("yarn", 150_000.0, 32.0, False)
    assert config.activation == ClampedGate(1.702, 7.0)
    # The settings of files that leave them out are the same.
    assert architecture(rope_scaling=None, layer_types=None, swiglu_limit=7) == config


REFUSED = {
    "quant_method = 'fp8' is not supported; supported: 'mxfp4'": {
        "quantization_config": {"quant_method": "fp8"}
    },
    "quantization_config as an object, or null; given 'mxfp4'": {"quantization_config": "mxfp4"},
    "quantization_config has settings .*not implemented: group_size = 16": {
        "quantization_config": {"quant_method": "mxfp4", "group_size": 16}
    },
    "num_experts_per_tok = 4 and experts_per_token = 8": {"experts_per_token": 8},
    "swiglu_limit as a number above 0; given 0": {"swiglu_limit": 0},
    "num_local_experts as a positive|num_experts as a positive": {"num_local_experts": -1},
    "not implemented .*attention_chunk_size = 8": {"attention_chunk_size": 8},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_not_supported_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        architecture(**REFUSED[message])


# --- attention sinks

SINKS = np.float32([2.0, -1.0])


def test_sinks_of_packed_streams_and_their_gradients_are_those_of_whole_scores():
    """The plain version in chunks of three tiles, the last one padded, and the kernel of GPUs."""
    window, stream, (q, k, v, weight) = 40, stream_of(), tensors(2, 1)
    settings = Settings((window, None), 1, D, D**-0.5, 3.0, jnp.float32, None, sinks=True)
    real = jnp.asarray(stream.segments > 0)[..., None, None]

    def both(attend):
        def out(q, k, v, sinks):
            return jnp.where(real, attend(q, k, v, of_layer(window)._replace(sinks=sinks)), 0)

        found, pull = jax.vjp(out, q, k, v, SINKS)
        return found, *pull(weight)

    mask = visible(*stream.tokens.pairs(), np.int32(window))

    def whole(q, k, v, layer):
        return dot_product_attention(q, k, v, mask, scale=D**-0.5, soft_cap=3.0, sinks=layer.sinks)

    def of(attend):
        return jax.jit(lambda: both(lambda *a: attend(*a, None)[0]))()

    wanted = jax.jit(lambda: both(whole))()
    assert np.abs(wanted[-1]).min() > 0.1
    in_turn = attention_kernels.tile_attention.stream_attention(
        stream, windows=True, score_bytes=3 << 15, **settings.plain
    )
    fast = attention_kernels._gpu_stream(settings, stream, interpret=True)
    for attend in (in_turn, fast):
        for ours, theirs in zip(of(attend), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_packed_training_scores_completions_as_padded_rows_do_and_so_does_the_sampler():
    policy, params = drawn_model("gpt_oss")
    engine = Engine(policy, max_prompt_length=8, max_response_length=12, num_slots=8)
    prompts = [[5, 9, 11, 30, 2, 41], [8], [7, 7, 3]]
    sampling = SamplingParams(n=2, max_tokens=12, routed_experts=True)
    groups = engine.generate(params, prompts, sampling, jax.random.key(1)).groups
    packed = packing.pack(Sequences(prompts, groups))
    scored, _ = make_log_probs(policy)(params, packed)
    trained = packed.trained
    np.testing.assert_allclose(
        np.asarray(scored)[trained], packed.log_probs["sampler"][trained], rtol=0, atol=1e-4
    )
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            assert completion.experts.shape == (len(completion), 3, 2)
            row = np.array([[*prompt, *completion.tokens]])
            whole = policy.log_probs(params, row)[0, len(prompt) :]
            np.testing.assert_allclose(completion.log_probs, whole, rtol=0, atol=1e-4)


def test_kernels_without_sinks_are_never_chosen_for_a_model_that_has_them():
    settings = Settings((None,), 2, 128, 0.1, None, jnp.bfloat16, None, sinks=True)
    attention_choice._warn_once.cache_clear()
    for use in (ROWS, STREAMS):
        with pytest.raises(ValueError, match="'cudnn' of .* has no attention sinks, which this"):
            attention_choice.resolve("cudnn", use, settings, "gpu")
        with pytest.warns(AttentionFallback, match="'pallas_tpu' of .* has no attention sinks"):
            assert attention_choice.resolve("auto", use, settings, "tpu") == "xla"
        assert attention_choice.resolve("auto", use, settings._replace(sinks=False), "tpu") != "xla"
        assert attention_choice.resolve("pallas_gpu", use, settings, "gpu") == "pallas_gpu"
    # In decoding the sinks stand beside the parts that kernels make.
    layout = CacheLayout(2, 2, 128, jnp.bfloat16, True, False)
    assert attention_choice.resolve("auto", kernels.DECODING, layout, "tpu") == "pallas_tpu"


def test_a_model_on_eight_devices_equals_transformers(tmp_path):
    write_drawn(config_of("gpt_oss"), tmp_path)
    mesh = sharding.make_mesh(fsdp=2, expert=2, tensor=2)
    policy, params = Policy.from_pretrained(tmp_path, mesh=mesh)
    assert params["layers"]["sinks"].addressable_shards[0].data.shape == (3, 2)
    golden = arrays("gpt_oss")
    # A row more, so that the batch divides.
    tokens, mask = (
        np.concatenate([golden[f"left_{name}"]] + [golden[f"left_{name}"][:1]])
        for name in ("tokens", "mask")
    )
    assert_golden("gpt_oss", "left", np.asarray(policy.logits(params, tokens, mask))[:3])


# --- experts with biases


def biased_layer(mesh=None):
    config = tiny.model_config(
        mixture=Mixture(6, 2, 12, router="softmax_of_chosen", biases=True, alternating=True),
        activation=ClampedGate(1.7, 0.8),
    )
    params = Policy(config).init(jax.random.key(0))["layers"]
    rng = np.random.default_rng(2)
    params = {
        name: jnp.asarray(rng.normal(size=p.shape[1:]), p.dtype) if "bias" in name else p[0]
        for name, p in params.items()
    }
    if mesh is not None:
        params = {
            name: jax.device_put(
                p,
                sharding.named_sharding(
                    mesh, parameters.at(("layers", name)).logical_axes, p.shape
                ),
            )
            for name, p in params.items()
        }
    return LayerWeights(params, config, jnp.float32, mesh, 1.0)


def looped(weights, x):
    """The mixture written as a loop over dense experts, in the words of gpt-oss."""
    m, p = weights.config.mixture, weights.params
    logits = jnp.einsum("btd,de->bte", x, p["experts_router"]) + p["experts_router_bias"]
    chosen, out = mixture.choose(m, logits, None, None), jnp.zeros_like(x)
    for e in range(m.num_experts):
        gate, up = (x @ p[f"experts_{n}"][e] + p[f"experts_{n}_bias"][e] for n in ("gate", "up"))
        gate, up = jnp.clip(gate, max=0.8), jnp.clip(up, -0.8, 0.8)
        hidden = (up + 1) * gate * jax.nn.sigmoid(1.7 * gate)
        made = hidden @ p["experts_down"][e] + p["experts_down_bias"][e]
        share = jnp.sum(jnp.where(chosen.experts == e, chosen.weights, 0), -1)
        out += jnp.where(PRESENT, share, 0)[..., None] * made
    return out


def test_experts_with_biases_are_the_loop_over_them_on_one_device_and_on_eight():
    plain = biased_layer()
    assert np.mean(np.abs(X @ plain.params["experts_gate"][0]) > 0.8) > 0.1
    wanted = value_and_gradient(plain, looped)
    assert_same(value_and_gradient(plain, mixed), wanted)
    for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}):
        mesh = sharding.make_mesh(**axes)
        assert_same(value_and_gradient(biased_layer(mesh), mixed), wanted)
    assert info().sinks is None


def test_the_drawn_weights_reach_the_limit_of_the_activation():
    """Else the golden logits would not tell whether it is clamped."""
    policy, params = drawn_model("gpt_oss")
    free = dataclasses.replace(
        policy.config, activation=dataclasses.replace(policy.config.activation, limit=1e9)
    )
    tokens = np.arange(12)[None]
    changed = dataclasses.replace(policy, config=free).logits(params, tokens)
    assert np.abs(changed - policy.logits(params, tokens)).max() > 0.1
    assert drawn("x", (2,)).dtype == np.float32
