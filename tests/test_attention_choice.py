"""One choice of attention: what runs where, what is refused, and no fallback without a warning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adpo_jax import Policy
from adpo_jax.engine import kernels
from adpo_jax.engine.kernels import DECODING, PREFILL, decode_gpu
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model import attention_choice
from adpo_jax.model.attention_choice import (
    NAMES,
    AttentionFallback,
    Implementation,
    Use,
    fitting,
    resolve,
)
from adpo_jax.model.attention_kernels import ROWS, STREAMS, Settings

USES = {use.name: use for use in (ROWS, STREAMS, PREFILL, DECODING)}


def of_model(use, head_dim=128, dtype=jnp.bfloat16, **changes):
    """What the implementations of a use look at."""
    if use is DECODING:
        layout = {"stacked": True, "transposed_keys": False, **changes}
        return CacheLayout(2, 2, head_dim, dtype, **layout)
    settings = Settings((None, None), 2, head_dim, head_dim**-0.5, None, dtype, None)
    return settings._replace(**changes)


@pytest.fixture
def each_warns():
    """Warnings that other tests have made are made again."""
    attention_choice._warn_once.cache_clear()
    yield
    attention_choice._warn_once.cache_clear()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_auto_is_the_kernel_of_the_platform_and_plain_elsewhere_without_a_word(use):
    assert resolve("auto", use, of_model(use), "tpu") == "pallas_tpu"
    of_gpu = "pallas_gpu" if use is DECODING else "mosaic_gpu"
    assert resolve("auto", use, of_model(use), "gpu") == of_gpu
    assert resolve("auto", use, of_model(use, head_dim=16, dtype=jnp.float32), "cpu") == "xla"


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_name_is_taken_where_it_runs_and_refused_elsewhere(use):
    for name, one in use.table.items():
        for platform in ("cpu", "gpu", "tpu"):
            if not one.platforms or platform in one.platforms:
                assert resolve(name, use, of_model(use), platform) == name
            else:
                wanted = f"{name!r} runs on a {one.platforms[0].upper()}, and this is a {platform}"
                with pytest.raises(ValueError, match=f"{wanted}; use auto, or xla"):
                    resolve(name, use, of_model(use), platform)
    for name in set(NAMES) - {"auto", *use.table}:
        with pytest.raises(ValueError, match=f"{name!r} is not implemented for {use.name}; .*xla"):
            resolve(name, use, of_model(use), "gpu")
    with pytest.raises(ValueError, match="attention is one of auto, xla, .*; given 'flash'"):
        resolve("flash", use, of_model(use), "cpu")


REFUSED = {
    "lanes of rows": (ROWS, "pallas_tpu", {"head_dim": 64}, "multiple of 128; given 64"),
    "lanes of streams": (STREAMS, "pallas_tpu", {"head_dim": 64}, "multiple of 128; given 64"),
    "lanes of decoding": (DECODING, "pallas_tpu", {"head_dim": 64}, "multiple of 128; given 64"),
    "Triton's shapes": (
        DECODING,
        "pallas_gpu",
        {"head_dim": 96},
        "power of two up to 512; given 96",
    ),
    "an int8 cache": (DECODING, "pallas_gpu", {"dtype": jnp.int8}, "has no int8 cache"),
    "turned keys": (DECODING, "pallas_gpu", {"transposed_keys": True}, "are not transposed"),
    "layers apart": (DECODING, "pallas_tpu", {"stacked": False}, "reads layers that are stacked"),
    "float32 on a GPU": (STREAMS, "pallas_gpu", {"dtype": jnp.float32}, "given float32"),
    "Triton's heads": (ROWS, "pallas_gpu", {"head_dim": 256}, "from 16 to 128; given 256"),
    "tiles of tensor cores": (STREAMS, "mosaic_gpu", {"head_dim": 96}, "of 64 or 128; given 96"),
    "float32 on Hopper": (ROWS, "mosaic_gpu", {"dtype": jnp.float32}, "given float32"),
    "wide numbers": (ROWS, "cudnn", {"dtype": jnp.float32}, "or float16; given float32"),
    "a wide head": (STREAMS, "cudnn", {"head_dim": 512}, "at most 256 .* given 512"),
    "a soft cap": (ROWS, "cudnn", {"soft_cap": 5.0}, "no soft cap"),
}


class Card:
    """A GPU as the choice looks at it."""

    platform, device_kind = "gpu", "a card"

    def __init__(self, capability: str):
        self.compute_capability = capability


def test_auto_on_a_gpu_is_plain_on_cards_and_jax_versions_that_have_no_kernel(monkeypatch, caplog):
    layout = of_model(DECODING)
    with caplog.at_level("INFO", logger="absl"):
        assert kernels.choose("auto", layout, Card("9.0")) == "pallas_gpu"
        assert kernels.choose("auto", layout, Card("7.5")) == "xla"
    assert "decoding on a card: xla: the kernel of GPUs needs a GPU of" in caplog.text
    monkeypatch.setattr(decode_gpu, "plt", None)
    assert kernels.choose("auto", layout, Card("9.0")) == "xla"
    with pytest.raises(ValueError, match="needs Pallas' Triton backend, which jax"):
        kernels.choose("pallas_gpu", layout, Card("9.0"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_a_model_is_refused_with_the_reason_and_the_cure(name):
    use, attention, changes, message = REFUSED[name]
    platform = "tpu" if attention == "pallas_tpu" else "gpu"
    with pytest.raises(ValueError, match=f"{use.name} .*{message}.* Use auto, or xla"):
        resolve(attention, use, of_model(use, **changes), platform)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_auto_warns_where_the_kernel_of_a_tpu_cannot_run_the_model(use, each_warns):
    model = of_model(use, head_dim=64)
    message = f"'pallas_tpu' of {use.name} needs a head_dim .* 64. The plain version runs instead"
    with pytest.warns(AttentionFallback, match=message):
        assert resolve("auto", use, model, "tpu") == "xla"


def test_a_gpu_runs_the_first_of_its_order_that_its_generation_and_the_model_allow(monkeypatch):
    for card, head_dim, name in (
        (Card("9.0"), 128, "mosaic_gpu"),
        (Card("10.0"), 128, "pallas_gpu"),
        (Card("8.0"), 64, "pallas_gpu"),
        (Card("9.0"), 32, "pallas_gpu"),
    ):
        monkeypatch.setattr(Settings, "gpu", card)
        assert resolve("auto", STREAMS, of_model(STREAMS, head_dim=head_dim), "gpu") == name
    monkeypatch.setattr(Settings, "gpu", Card("8.0"))
    with pytest.raises(
        ValueError, match="needs a Hopper GPU, of compute capability 9.0; given 8.0"
    ):
        resolve("mosaic_gpu", STREAMS, of_model(STREAMS), "gpu")


def test_a_fallback_is_told_once_for_each_use_and_reason(each_warns):
    def limit(model, tokens):
        return f"takes 9 tokens; given {tokens}" if tokens > 9 else ""

    kernel = Implementation(print, ("gpu",), limit=limit)
    table = {"xla": Implementation(print), "pallas_gpu": kernel}
    one, another = Use("one", table), Use("another", table)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert fitting("pallas_gpu", one, None, 9) == "pallas_gpu"
        for use, tokens in ((one, 10), (one, 10), (another, 10), (one, 11)):
            assert fitting("pallas_gpu", use, None, tokens) == "xla"
    assert [str(w.message).split(". ")[0] for w in told] == [
        "attention 'pallas_gpu' of one takes 9 tokens; given 10",
        "attention 'pallas_gpu' of another takes 9 tokens; given 10",
        "attention 'pallas_gpu' of one takes 9 tokens; given 11",
    ]
    with pytest.warns(AttentionFallback, match="'cudnn' of another is not implemented"):
        assert fitting("cudnn", another, None) == "xla"


def test_prefill_that_the_gpu_kernel_does_not_have_runs_plain_with_a_warning(each_warns):
    policy = Policy(tiny.model_config())
    layout = CacheLayout(2, 2, 16, jnp.float32, stacked=True, transposed_keys=False)
    params = policy.init(jax.random.key(0))
    tokens, lengths = np.ones((2, 8), np.int32), np.array([8, 5], np.int32)
    plain = Verbs(policy, layout, "xla").prefill(params, tokens, lengths)
    message = "'pallas_gpu' of prefill takes bfloat16 or float16; given float32. The plain"
    with pytest.warns(AttentionFallback, match=message):
        fallen_back = Verbs(policy, layout, "pallas_gpu").prefill(params, tokens, lengths)
    jax.tree.map(np.testing.assert_array_equal, fallen_back, plain)


def test_what_decodes_also_has_a_prefill():
    assert set(DECODING.table) <= set(PREFILL.table)


def test_a_policy_refuses_an_attention_that_cannot_run_its_model():
    for changes, message in (
        ({"attention": "pallas_tpu_interpret"}, "multiple of 128; given 16. Use auto"),
        ({"attention": "cudnn"}, "runs on a GPU, and this is a cpu"),
        ({"attention": "pallas_gpu"}, "runs on a GPU, and this is a cpu"),
        ({"attention": "flash"}, "attention is one of auto, xla"),
    ):
        with pytest.raises(ValueError, match=message):
            Policy(tiny.model_config(), **changes)
