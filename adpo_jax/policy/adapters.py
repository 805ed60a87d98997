"""Folders of adapters in peft's format: adapter_config.json and adapter_model.safetensors.

Where a checkpoint holds several weights in one module (Phi-3's `qkv_proj`), each has an adapter of
its own here and the module has one there. Those of n weights become one of n times the rank, whose
B is zero but for one block a weight; `rank_pattern` and `alpha_pattern` say so. An adapter of the
plain rank, as peft makes it, is read as one A that the weights share.

Where one tensor of a layer holds the matrices of all experts, peft names it in `target_parameters`
and keeps one A [E R, in] and one B [out, R E] of them, in which the number of the expert comes
first and last. The module of several such tensors is wrapped once for each: the last one of them
has the plain name, and each one before it has one more `base_layer` in its own.

Source: https://huggingface.co/docs/peft, "PEFT checkpoint format"; `ParamWrapper` of
https://github.com/huggingface/peft.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from adpo_jax.hf import folders
from adpo_jax.hf.safetensors_files import Checkpoint
from adpo_jax.hf.tensors import WRAPPED_PREFIXES, layer_tensor, leaves
from adpo_jax.model import lora, parameter_table, parameters
from adpo_jax.model.lora import Lora
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.policy.policy import Policy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

LARGEST_RANK = 1 << 16

# Settings of peft that the folder's tensors tell too, that are read below, or that no forward pass
# depends on. The configs of initialisations say no more than `init_lora_weights` does.
PASSED_OVER = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
    *("lora_dropout", "task_type", "inference_mode", "qalora_group_size", "runtime_config"),
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Those with values that leave a plain adapter of the base's own weights; the first is the default.
# Every other setting, of this version of peft or a later one, has to be off.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train beside base weights that they have changed.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}


def find(name: str | os.PathLike) -> tuple[Path, Lora]:
    """An adapter folder, local or of a hub name, and the description of its adapters.

    Raises:
      ValueError: when there is none, or it changes the model in a way that is not supported.
    """
    folder = folders.find_folder(name, (CONFIG, WEIGHTS))
    config = folders.read_json(folder / CONFIG)
    _refuse_unknown(folder / CONFIG, config)
    if not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(f"{folder / CONFIG} gives no r and lora_alpha; is it an adapter of peft?")
    rank, alpha = config["r"], config["lora_alpha"]
    if type(rank) is not int or not 0 < rank <= LARGEST_RANK:
        raise ValueError(
            f"{folder / CONFIG}: r is an integer of 1 to {LARGEST_RANK}; given {rank!r:.80}"
        )
    if type(alpha) not in (int, float) or not 0 < alpha < 1e30:
        raise ValueError(f"{folder / CONFIG}: lora_alpha is a number above 0; given {alpha!r:.80}")
    _check_patterns(folder / CONFIG, config, rank, alpha)
    held = {name.rsplit(".lora_", 1)[0] for name in _checkpoint(folder)}
    held = {re.sub(r"^model\.layers\.\d+\.", "", name) for name in held}
    modules = [m for m in parameters.adapted_modules() if m.format(0) in held]
    modules += _held_parameters(folder / CONFIG, config, held)
    adapted = {name for module in modules for name in parameters.of_module(module)}
    targets = tuple(name for name in parameters.adaptable() if name in adapted)
    if not targets:
        raise ValueError(f"{folder / WEIGHTS} holds no adapter of a layer's {_supported()}")
    return folder, Lora(rank, float(alpha), targets)


def _refuse_unknown(path: Path, config: dict) -> None:
    """Refuses settings that may make another model of the tensors than plain LoRA does."""
    for key, value in config.items():
        off = not value and key not in PLAIN
        if off or key in PASSED_OVER or value in PLAIN.get(key, ()):
            continue
        supported = ", ".join(map(repr, PLAIN.get(key, (None,))))
        cure = "" if key in PLAIN else "; write that there if the adapter is plain LoRA without it"
        if key == "init_lora_weights":
            cure = (
                ". Others change the weights of the base; peft's save_pretrained with "
                "path_initial_model_for_weight_conversion writes an adapter of the unchanged ones"
            )
        raise ValueError(f"{path}: {key[:80]} is {value!r:.80}, supported is {supported}{cure}")


def _check_patterns(path: Path, config: dict, rank: int, alpha: float) -> None:
    """Refuses ranks of single modules, but for those that `save` writes of joined weights."""
    several = {
        _last_part(module): len(set(map(parameters.plain_name, parameters.of_module(module))))
        for module in parameters.adapted_modules()
    }
    for key, plain in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        given = config.get(key) or {}
        allowed = {m: n * plain for m, n in several.items() if n > 1}
        fits = isinstance(given, dict) and given.items() <= allowed.items()
        if not fits or given.keys() != (config.get("rank_pattern") or {}).keys():
            raise ValueError(
                f"{path}: {key} is {given!r:.80}, supported is None, or, of modules that hold n "
                "weights, n times that of the others"
            )


def _held_parameters(path: Path, config: dict, held: set[str]) -> list[str]:
    """The tensors of all experts that `target_parameters` names and that have an adapter."""
    given = config.get("target_parameters") or []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            f"{path}: target_parameters is a list of names, or null; given {given!r:.80}"
        )
    found = {row.hf_module for row in parameter_table.LAYER if row.one_tensor_for_all}
    found &= set(parameters.adapted_modules())
    return [
        name
        for name in sorted(found)
        if name.rpartition(".")[0] in held
        and any(f".{name}".endswith(f".{n}") or n.endswith(f".{name}") for n in given)
    ]


def _last_part(hf_module: str) -> str:
    """The last part of a module's name, by which peft knows it."""
    return hf_module.rpartition(".")[2]


def _supported() -> str:
    return lora.hf_names(parameters.adaptable())


def load(policy: Policy, params, name: str | os.PathLike) -> tuple[Policy, Any]:
    """Loads the adapters of a folder beside the weights of a policy.

    Args:
      policy, params: a policy without adapters, and its parameters.

    Returns:
      (policy, params).

    Raises:
      ValueError: as `find` and `Policy.with_adapters`, and naming the tensors that do not fit the
        model.
    """
    folder, adapters = find(name)
    checkpoint = _checkpoint(folder)
    modules = _modules(policy.config, adapters)
    wanted = {name for module in modules for pair in module.tensors for name in pair}
    unexpected = sorted(set(checkpoint) - wanted)
    if unexpected:
        raise ValueError(
            f"{folder / WEIGHTS} has tensors that are not used, {unexpected[0]} for one; adapters "
            f"of {_supported()} are read, in every layer or in none"
        )
    matrices = {}
    for module in modules:
        numbers = range(len(module.tensors))
        pairs = [
            pair for i in numbers for pair in _read(folder, checkpoint, module, i, adapters.rank)
        ]
        for part, name in enumerate(module.names):
            a, b = parameters.adapter_names(name)
            matrices[a] = np.stack([pair[part][0] for pair in pairs])
            matrices[b] = np.stack([pair[part][1] for pair in pairs])

    policy, params = policy.with_adapters(params, adapters, jax.random.key(0))
    trained, frozen = lora.split(params)
    loaded = {}
    for leaf in leaves(policy.config, trained):
        name, like = leaf.path[-1], leaf.of(trained)
        stacked = matrices[name].reshape(*leaf.stack, *leaf.split_shape)
        if not np.isfinite(stacked).all():
            raise ValueError(f"{folder / WEIGHTS}: NaN or infinity in an adapter of {name}")
        loaded[name] = jax.device_put(stacked.transpose(leaf.order), like.sharding)
    return policy, lora.join({"layers": loaded}, frozen)


@dataclasses.dataclass(frozen=True)
class _Module:
    """A Hugging Face module with an adapter.

    Attributes:
      name: below the layer, with "{}" for the number of an expert.
      names: of its weights, one or several.
      inputs: width of its input.
      outputs: width of the output of each weight.
      tensors: the names of A and B in each layer, and there of each expert.
      experts: how many experts share an A and a B; 0 where they have their own, or there are none.
      alternates: whether the outputs of the weights take turns.
      turned: whether peft takes inputs for outputs.
    """

    name: str
    names: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]
    tensors: tuple[tuple[str, str], ...]
    experts: int = 0
    alternates: bool = False
    turned: bool = False


def _modules(config: ModelConfig, adapters: Lora) -> list[_Module]:
    """The modules of a model that hold the weights which adapters are of."""
    rows = {row.name: row for row in parameters.of_model(config).values() if row.adapter_inputs}
    found = []
    groups: dict[Any, list[str]] = {}  # the weights of one module in the same layers
    for name, row in rows.items():
        groups.setdefault((row.hf_module, tuple(row.layers_of(config))), []).append(name)
    groups = {key: names for key, names in groups.items() if set(names) & set(adapters.targets)}
    for (module, _), names in groups.items():
        first, sizes = rows[names[0]], []
        for row in (rows[name] for name in names):
            shape, n = row.shape(config)[len(row.experts) :], row.adapter_inputs
            sizes.append((math.prod(shape[:n]), math.prod(shape[n:])))
        experts = config.mixture.num_experts if first.one_tensor_each else 1
        held = module
        if first.one_tensor_for_all:
            held, _ = module.rsplit(".", 1)
            siblings = [other for other, _ in groups if other.rpartition(".")[0] == held]
            held += ".base_layer" * (len(siblings) - 1 - siblings.index(module))
        tensors = tuple(
            tuple(layer_tensor(i, f"{held.format(e)}.lora_{x}.weight") for x in "AB")
            for i in first.layers_of(config)
            for e in range(experts)
        )
        outputs = tuple(out for _, out in sizes)
        expert_fields = {}
        if first.one_tensor_for_all:
            expert_fields = {
                "experts": config.mixture.num_experts,
                "alternates": first.alternates,
                "turned": first.turned_in_peft,
            }
        found.append(_Module(module, tuple(names), sizes[0][0], outputs, tensors, **expert_fields))
    return found


def _read(folder: Path, checkpoint: Checkpoint, module: _Module, number: int, rank: int):
    """For each expert of two tensors, or once, A [R, in] and B [out, R] of each weight."""
    n, names, E = len(module.names), module.tensors[number], module.experts or 1
    a_name, _ = names
    joined = n > 1 and a_name in checkpoint and checkpoint.shape(a_name)[:1] != (E * rank,)
    R = n * rank if joined else rank
    widths = module.inputs, sum(module.outputs)
    inputs, outputs = reversed(widths) if module.turned else widths
    for tensor, shape in zip(names, ((E * R, inputs), (outputs, R * E))):
        found = checkpoint.shape(tensor) if tensor in checkpoint else None
        if found != shape:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit the model: {tensor} has shape {found}, "
                f"wanted {shape}"
            )
    a, b = (checkpoint.array(tensor).astype(np.float32) for tensor in names)
    a, b = a.reshape(E, R, inputs), b.reshape(outputs, R, E).transpose(2, 0, 1)
    if module.turned:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    return [_apart(folder, module, names[1], joined, *pair) for pair in zip(a, b)]


def _apart(folder: Path, module: _Module, name: str, joined: bool, a: np.ndarray, b: np.ndarray):
    """A and B of each weight of a module, from the one A and the one B that it has."""
    n = len(module.names)
    if module.alternates:
        rows = [b[i::n] for i in range(n)]
    else:
        rows = np.split(b, np.cumsum(module.outputs)[:-1])
    if not joined:
        return [(a, part) for part in rows]
    blocks = [np.split(part, n, axis=1) for part in rows]
    if any(blocks[i][j].any() for i in range(n) for j in range(n) if i != j):
        raise ValueError(
            f"{folder / WEIGHTS}: {name} mixes the {n} weights of {module.name}, so that it is no "
            f"adapter of rank {len(a) // n} of each of them; train one without rank_pattern"
        )
    return list(zip(np.split(a, n), (blocks[i][i] for i in range(n))))


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
    on_disk = {}
    for leaf in leaves(policy.config, whole):
        each = [
            leaf.of(whole)[leaf.place(number)].transpose(leaf.disk_order).reshape(leaf.part_shape)
            for number in range(len(leaf.hf_names))
        ]
        if leaf.parameter.one_tensor_for_all:
            each = [matrix for experts in each for matrix in experts]
        on_disk[leaf.path[-1]] = each
    modules, tensors = _modules(policy.config, policy.lora), {}
    for module in modules:
        for number, names in enumerate(module.tensors):
            for name, x in zip(names, _written(module, on_disk, number, policy.lora.rank)):
                tensors[PREFIX + name] = np.ascontiguousarray(x)
    _warn_of_peft(modules)
    several = {_last_part(m.name): len(m.names) for m in modules if len(m.names) > 1}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": policy.lora.rank,
        "lora_alpha": policy.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(
            dict.fromkeys(_last_part(module.name) for module in modules if not module.experts)
        ),
        "bias": "none",
        "inference_mode": True,
    }
    if named := [module.name for module in modules if module.experts]:
        config["target_parameters"] = list(dict.fromkeys(named))
    if several:
        config["rank_pattern"] = {m: n * policy.lora.rank for m, n in several.items()}
        config["alpha_pattern"] = {m: n * policy.lora.alpha for m, n in several.items()}
    with folders.new_folder(folder, overwrite=overwrite) as temporary:
        if jax.process_index() == 0:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            folders.write_json(temporary / CONFIG, config)


def _warn_of_peft(modules: list[_Module]) -> None:
    """Says where peft would drop adapters: of experts and of other modules with the same names.

    peft 0.21 takes names such as gate_proj for those of one of the two kinds alone.
    """
    in_experts, elsewhere = (
        {_last_part(module.name) for module in modules if ("{}" in module.name) is experts}
        for experts in (True, False)
    )
    if both := sorted(in_experts & elsewhere):
        logging.warning(
            "the adapters of %s belong to experts and to other modules, of which peft 0.21 loads "
            "one kind alone without a word; load the merged export there, or train adapters of "
            "attention alone (actor_rollout_ref.model.lora_target_modules)",
            ", ".join(both),
        )


def _written(module: _Module, on_disk: dict[str, list], number: int, rank: int):
    """The A and the B of a module in a layer, or of one of its experts."""
    E = module.experts
    if not E:
        return _together(module, on_disk, number, rank)
    pairs = [_together(module, on_disk, E * number + e, rank) for e in range(E)]
    a, b = map(np.stack, zip(*pairs))
    if module.turned:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def _together(module: _Module, on_disk: dict[str, list], number: int, rank: int):
    """A [n R, in] and B [sum of out, n R] of a module of n weights; zero for those without one."""
    n = len(module.names)
    a = np.zeros((n, rank, module.inputs), np.float32)
    b = [np.zeros((out, n, rank), np.float32) for out in module.outputs]
    for i, name in enumerate(module.names):
        a_name, b_name = parameters.adapter_names(name)
        if a_name in on_disk:
            a[i], b[i][:, i] = on_disk[a_name][number], on_disk[b_name][number]
    whole = np.stack(b, axis=1) if module.alternates else np.concatenate(b)
    return a.reshape(n * rank, -1), whole.reshape(-1, n * rank)


def _checkpoint(folder: Path) -> Checkpoint:
    """The tensors of an adapter by the names of a language model's modules."""
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {WEIGHTS}; peft's save_pretrained writes it")
    checkpoint = Checkpoint([folder / WEIGHTS])
    prefixes = {PREFIX + old: new for old, new in WRAPPED_PREFIXES.items()} | {PREFIX: ""}
    checkpoint.rename(prefixes)
    return checkpoint
