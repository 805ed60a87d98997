"""Folders of adapters in peft's format: adapter_config.json and adapter_model.safetensors.

Source: https://huggingface.co/docs/peft, "PEFT checkpoint format".
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from adpo_jax.hf import folders
from adpo_jax.hf.safetensors_files import Checkpoint
from adpo_jax.hf.tensors import GEMMA3_PREFIXES, leaves
from adpo_jax.model import lora, parameters
from adpo_jax.model.lora import Lora
from adpo_jax.policy.policy import Policy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

LARGEST_RANK = 1 << 16

# Settings of peft that may change the forward pass, with the values that leave it alone.
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
    """An adapter folder, local or of a hub name, and the description of its adapters.

    Raises:
      ValueError: when there is none, or it changes the model in a way that is not supported.
    """
    folder = folders.find_folder(name, (CONFIG, WEIGHTS))
    config = folders.read_json(folder / CONFIG)
    for key, allowed in WITHOUT_EFFECT.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {config[key]!r:.80}, supported is {allowed[0]!r}"
            )
    if not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(f"{folder / CONFIG} gives no r and lora_alpha; is it an adapter of peft?")
    rank, alpha = config["r"], config["lora_alpha"]
    if type(rank) is not int or not 0 < rank <= LARGEST_RANK:
        raise ValueError(
            f"{folder / CONFIG}: r is an integer of 1 to {LARGEST_RANK}; given {rank!r:.80}"
        )
    if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
        raise ValueError(f"{folder / CONFIG}: lora_alpha is a number above 0; given {alpha!r:.80}")
    held = {name.rsplit(".lora_", 1)[0] for name in _checkpoint(folder)}
    held = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in held}
    rows = (row for row in parameters.LAYER if row.adapter_inputs)
    targets = tuple(dict.fromkeys(row.name for row in rows if row.hf_module.format(0) in held))
    if not targets:
        raise ValueError(f"{folder / WEIGHTS} holds no adapter of a layer's {_supported()}")
    return folder, Lora(rank, float(alpha), targets)


def _supported() -> str:
    return lora.hf_names(parameters.adaptable())


def load(policy: Policy, params, name: str | os.PathLike) -> tuple[Policy, Any]:
    """Loads the adapters of a folder beside the weights of a policy.

    Args:
      policy, params: a policy without adapters, and its parameters.

    Returns:
      (policy, params).

    Raises:
      ValueError: as `find`, and naming the tensors that do not fit the model.
    """
    folder, adapters = find(name)
    checkpoint = _checkpoint(folder)
    shapes, _ = lora.split(dataclasses.replace(policy, lora=adapters).abstract_params())
    adapter_leaves = leaves(policy.config, shapes)
    wanted = {name: leaf.hf_shape for leaf in adapter_leaves for name in leaf.hf_names}
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

    policy, params = policy.with_adapters(params, adapters, jax.random.key(0))
    trained, frozen = lora.split(params)
    loaded = {}
    for leaf in adapter_leaves:
        name, like = leaf.path[-1], leaf.of(trained)
        tensors = [checkpoint.array(tensor).astype(np.float32) for tensor in leaf.hf_names]
        stacked = np.stack(tensors).reshape(*leaf.stack, *leaf.split_shape)
        if not np.isfinite(stacked).all():
            raise ValueError(f"{folder / WEIGHTS}: NaN or infinity in an adapter of {name}")
        loaded[name] = jax.device_put(stacked.transpose(leaf.order), like.sharding)
    return policy, lora.join({"layers": loaded}, frozen)


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
    for leaf in leaves(policy.config, whole):
        for number, name in enumerate(leaf.hf_names):
            x = leaf.of(whole)[leaf.place(number)]
            tensor = x.transpose(leaf.disk_order).reshape(leaf.hf_shape)
            tensors[PREFIX + name] = np.ascontiguousarray(tensor)
    rows = parameters.adaptable(policy.config)
    modules = [rows[target].hf_module.rpartition(".")[2] for target in policy.lora.targets]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": policy.lora.rank,
        "lora_alpha": policy.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(dict.fromkeys(modules)),
        "bias": "none",
        "inference_mode": True,
    }
    with folders.new_folder(folder, overwrite=overwrite) as temporary:
        if jax.process_index() == 0:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            folders.write_json(temporary / CONFIG, config)


def _checkpoint(folder: Path) -> Checkpoint:
    """The tensors of an adapter by the names of a language model's modules."""
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {WEIGHTS}; peft's save_pretrained writes it")
    checkpoint = Checkpoint([folder / WEIGHTS])
    prefixes = {PREFIX + old: new for old, new in GEMMA3_PREFIXES.items()} | {PREFIX: ""}
    checkpoint.rename(prefixes)
    return checkpoint
