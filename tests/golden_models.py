"""The tiny checkpoints of `tests/golden/`, loaded once a process."""

import functools
import json
import tempfile
import zlib
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from adpo_jax import Policy
from adpo_jax.hf import folders
from adpo_jax.hf.tensors import leaves
from adpo_jax.policy import adapters

GOLDEN = Path(__file__).parent / "golden"
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe")
FAMILIES = (
    *("qwen2", "qwen3", "llama", "llama_bias_tied", "mistral", "gemma2", "gemma3_text"),
    *MIXTURES,
)
VARIANTS = ("qwen2_sliding", "llama_linear", "llama_yarn", "llama_yarn_mscale")
# Families whose folders hold no weights, but logits for those of `drawn`.
DRAWN = (
    "smollm3",
    "olmo2",
    "olmo3",
    "phi3",
    "granite",
    "glm4",
    "ministral",
    "ministral3",
    "seed_oss",
    "gemma4_text",
    "gemma4_large",
    "gemma4_moe",
    "llama4_text",
    "llama4_scout",
    "llama4_maverick",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)


def config_of(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


@functools.cache
def model(name: str):
    """(policy, params) in float32; a variant has the weights of its family."""
    config = config_of(name)
    weights = GOLDEN / config.pop("weights_of", name)
    policy = Policy.abstract_from_config(config)
    params = folders.load_params(
        policy.config, policy.abstract_params(), weights, config["model_type"]
    )
    return policy, params


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 values that bfloat16 holds, the same for a tensor's name for ever."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        values = 0.3 * noise + any(part in name for part in ("norm", "scalar", "router.scale"))
    else:
        values = 1.5 * noise / (1 if "embed" in name else shape[1]) ** 0.5
    return np.float32(values).astype("bfloat16").astype(np.float32)


def write_drawn(config: dict, folder: Path) -> None:
    """Writes config.json and the drawn weights of a model into a folder."""
    policy = Policy.abstract_from_config(config)
    shapes = {
        name: leaf.hf_shape
        for leaf in leaves(policy.config, policy.abstract_params())
        for name in leaf.hf_names
    }
    tensors = {name: drawn(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@functools.cache
def drawn_model(name: str):
    """(policy, params) of one of `DRAWN`, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write_drawn(config_of(name), Path(folder))
        return Policy.from_pretrained(folder)


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """`<batch>_tokens`, `<batch>_mask` [3, T] and `<batch>_logits` at the real tokens, [n, 64]."""
    with np.load(GOLDEN / name / "logits.npz") as file:
        return dict(file)


def assert_adapters_come_back(base, adapted, folder: Path, atol: float = 1e-4):
    """Adapters are read as they were written, and merged ones give the same logits.

    Args:
      base, adapted: (policy, params) without and with adapters that change something.
      atol: how far logits may be apart.
    """
    (policy, params), (ours, tree) = base, adapted
    adapters.save(folder / "adapter", ours, tree, base_model="some/model")
    found, read = adapters.load(policy, params, folder / "adapter")
    assert (found.lora.rank, found.lora.alpha) == (ours.lora.rank, ours.lora.alpha)
    assert sorted(found.lora.targets) == sorted(ours.lora.targets)
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    ours.save_pretrained(folder / "merged", tree)
    tokens = np.arange(12)[None]
    merged = Policy.from_pretrained(folder / "merged")
    wanted = ours.logits(tree, tokens)
    np.testing.assert_allclose(merged[0].logits(merged[1], tokens), wanted, rtol=0, atol=atol)
    assert np.abs(wanted - policy.logits(params, tokens)).max() > 0.1
