"""Adapters as peft keeps them: a folder with adapter_config.json and adapter_model.safetensors.

Source: https://huggingface.co/docs/peft, "PEFT checkpoint format".

Letters: L layers, R rank.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from adpo_jax import hf, lora
from adpo_jax.hf_tensors import GEMMA3_PREFIXES, LAYER_TENSORS
from adpo_jax.lora import Lora
from adpo_jax.policy import Policy
from adpo_jax.safetensors_files import Checkpoint

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What would change the forward pass, with the values that leave it alone.
WITHOUT_EFFECT: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (None, False),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "alora_invocation_tokens": (None, []),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
}


def find(name: str | os.PathLike) -> tuple[Path, Lora]:
    """An adapter folder, local or of a hub name, and what its adapters are.

    Raises:
      ValueError: when there is none, or it changes the model in a way that is not supported.
    """
    folder = hf.find_folder(name, (CONFIG, WEIGHTS))
    config = hf.read_json(folder / CONFIG)
    for key, allowed in WITHOUT_EFFECT.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {config[key]!r}, supported is {allowed[0]!r}"
            )
    if not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(f"{folder / CONFIG} gives no r and lora_alpha; is it an adapter of peft?")
    held = {name.rsplit(".lora_", 1)[0] for name in _checkpoint(folder)}
    targets = tuple(target for target in lora.INPUT_AXES if _module(target, 0) in held)
    if not targets:
        raise ValueError(f"{folder / WEIGHTS} holds no adapter of a layer's {_supported()}")
    return folder, Lora(int(config["r"]), float(config["lora_alpha"]), targets)


def _supported() -> str:
    return ", ".join(map(lora.hf_name, lora.INPUT_AXES))


def load(policy: Policy, params, name: str | os.PathLike) -> tuple[Policy, Any]:
    """A policy with the adapters of a folder beside its weights.

    Args:
      policy, params: without adapters.

    Returns:
      (policy, params).

    Raises:
      ValueError: as `find`, and naming the tensors that do not fit the model.
    """
    folder, adapters = find(name)
    policy, params = policy.with_adapters(params, adapters, jax.random.key(0))
    checkpoint = _checkpoint(folder)
    wanted = _disk_shapes(params)
    unexpected = sorted(set(checkpoint) - wanted.keys())
    if unexpected:
        raise ValueError(
            f"{folder / WEIGHTS} has tensors that are not used, {unexpected[0]} for one; adapters "
            f"of {_supported()} are read, in every layer or in none"
        )
    for tensor, shape in wanted.items():
        found = checkpoint.shape(tensor) if tensor in checkpoint else None
        if found != shape:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit the model: {tensor} has shape {found}, "
                f"wanted {shape}"
            )

    def read(path, like):
        name = path[-1].key
        tensors = [checkpoint.array(t).astype(np.float32).T for t in _tensors(name, like.shape[0])]
        stacked = np.stack(tensors).reshape(like.shape)
        if not np.isfinite(stacked).all():
            raise ValueError(f"{folder / WEIGHTS}: NaN or infinity in an adapter of {name}")
        return jax.device_put(stacked, like.sharding)

    trained, frozen = lora.split(params)
    return policy, lora.join(jax.tree_util.tree_map_with_path(read, trained), frozen)


def save(
    folder: str | os.PathLike, policy: Policy, params, *, base_model: str, overwrite: bool = False
) -> None:
    """Writes the adapters as a folder that `peft.PeftModel.from_pretrained` reads.

    On several processes all of them must call this, and process 0 writes.

    Args:
      base_model: folder or hub name of the frozen weights, noted in the folder.

    Raises:
      ValueError: for a policy without adapters, or a folder that is not empty, unless `overwrite`.
    """
    if policy.lora is None:
        raise ValueError("this policy has no adapters; write it with save_pretrained")
    everywhere = policy.mesh and NamedSharding(policy.mesh, PartitionSpec())
    trained, _ = lora.split(params)
    whole = jax.device_get(jax.jit(lambda x: x, out_shardings=everywhere)(trained))
    tensors = {}
    for name, stacked in whole["layers"].items():
        for tensor, x in zip(_tensors(name, len(stacked)), stacked):
            tensors[PREFIX + tensor] = np.ascontiguousarray(x.reshape(_matrix(name, x.shape)).T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": policy.lora.rank,
        "lora_alpha": policy.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [lora.hf_name(target) for target in policy.lora.targets],
        "bias": "none",
        "inference_mode": True,
    }
    with hf.new_folder(folder, overwrite=overwrite) as temporary:
        if jax.process_index() == 0:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            hf.write_json(temporary / CONFIG, config)


def _checkpoint(folder: Path) -> Checkpoint:
    """The tensors of an adapter by the names of a language model's modules."""
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {WEIGHTS}; peft's save_pretrained writes it")
    checkpoint = Checkpoint([folder / WEIGHTS])
    prefixes = {PREFIX + old: new for old, new in GEMMA3_PREFIXES.items()} | {PREFIX: ""}
    checkpoint.rename(prefixes)
    return checkpoint


def _module(weight: str, layer: int) -> str:
    hf_name = LAYER_TENSORS[weight].hf_name.removesuffix(".weight")
    return f"model.layers.{layer}.{hf_name}"


def _tensors(name: str, num_layers: int) -> list[str]:
    """The tensors on disk of an A or B, one a layer."""
    weight, matrix = name.split("_lora_")
    return [f"{_module(weight, i)}.lora_{matrix.upper()}.weight" for i in range(num_layers)]


def _disk_shapes(params) -> dict[str, tuple[int, int]]:
    """The shape on disk of every adapter's tensors: A [R, inputs], B [outputs, R]."""
    shapes = {}
    for name, stacked in lora.split(params)[0]["layers"].items():
        L, *shape = stacked.shape
        shapes |= dict.fromkeys(_tensors(name, L), _matrix(name, shape)[::-1])
    return shapes


def _matrix(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """The shape of an A [*in, R] as [inputs, R], of a B [R, *out] as [R, outputs]."""
    if name.endswith("_a"):
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])
