"""Loads a model to use: from a Hugging Face folder or hub name, a run's folder or a checkpoint.

Only the parameters of a checkpoint are read, not the rest of the training state.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from ml_collections import ConfigDict

from adpo_jax.config import default_config
from adpo_jax.data.prompts import Message, PromptFormat, prompts_of_texts
from adpo_jax.hf.files import read_json
from adpo_jax.hf.folders import local_path
from adpo_jax.model import lora
from adpo_jax.policy.policy import Policy
from adpo_jax.run import config_files, datasets, identity, loading
from adpo_jax.run.checkpoint_files import (
    CheckpointError,
    DamagedError,
    check_arrays,
    check_digests,
    complete_steps,
    read_description,
    read_on_all,
)
from adpo_jax.run.folder import RunFolder
from adpo_jax.update import TrainState


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with everything that is needed to use it.

    Attributes:
      stop_token_ids: the tokens that end a completion.
      prompt_format: the format of the run that trained it; the plain one for a Hugging Face folder.
      source: the folder or name it was read from.
    """

    policy: Policy
    params: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    prompt_format: PromptFormat
    source: str

    def prompts(
        self,
        texts: list[str | list[Message]],
        *,
        max_length: int,
        prompt_format: PromptFormat | None = None,
    ) -> list[list[int]]:
        """Token ids of texts or lists of messages.

        Args:
          max_length: the most tokens of a prompt.
          prompt_format: a format to use in place of the model's.

        Raises:
          ValueError: for a prompt that is empty, too long or cannot be rendered.
        """
        return prompts_of_texts(
            texts, self.tokenizer, prompt_format or self.prompt_format, max_length=max_length
        )


def load(
    name: str | os.PathLike,
    *,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
    keep_base_dtype: bool = False,
    for_prompts: bool = True,
) -> Pretrained:
    """Loads a model by its folder or hub name.

    Args:
      name: a Hugging Face folder or hub name; or the folder of a run, whose exported policy is read
        unless a checkpoint is newer; or the folder `checkpoints` of a run, whose newest one is
        read; or a folder in it.
      dtype: dtype of the parameters and the computation.
      mesh: devices; None for the default device.
      trust_remote_code: whether to run code in the model's folder that its tokenizer asks for.
      override_config: keys of config.json with other values; None leaves a key out. A run has those
        of its own config besides.
      keep_base_dtype: hold the frozen weights of a run's adapters in the dtype that they had there,
        whatever `dtype` is, so that the adapters are merged into those.
      for_prompts: whether the prompt format will be used. A run is refused then whose config.json
        left out a part of it for a secret.

    Raises:
      ValueError: when there is no such model, or it cannot be read.
    """
    run, step = _run_and_step(local_path(name))
    if run is None:
        return _from_hugging_face(
            name, dtype, mesh, PromptFormat(), trust_remote_code, override_config
        )
    config = _run_config(run)
    # The user consents, not the folder.
    config.actor_rollout_ref.model.trust_remote_code = trust_remote_code
    prompt_format = datasets.prompt_format(config)
    if for_prompts:
        _refuse_format_with_gaps(run, prompt_format)
    newest = max(complete_steps(run.checkpoints), default=0)
    # An export without a note is whole, since it appears by a rename.
    if step is None and run.export.is_dir() and (run.exported_step or newest) >= newest:
        return _from_hugging_face(
            run.export, dtype, mesh, prompt_format, trust_remote_code, override_config
        )
    _override(config, override_config)
    _take_adapters_as_trained(run, config)
    source = loading.find_model(config)
    base_dtype = None
    if keep_base_dtype and source.lora:
        base_dtype = "bfloat16" if config.trainer.bf16 else "float32"
    policy = Policy.abstract_from_config(
        source.hf_config,
        dtype=dtype,
        param_dtype=base_dtype,
        mesh=mesh,
        lora=source.lora,
        generation_config=source.generation_config,
    )
    checkpoint = _checkpoint_folder(run, step)
    state = _read_state(checkpoint, policy)
    if policy.lora:
        # The frozen weights are told by their bits in the dtype that the run held them in.
        state = state.with_frozen(loading.initial_params(config, source, policy.mesh))
    params = jax.tree.map(
        lambda x, like: x.astype(like.dtype), state.params, policy.abstract_params()
    )
    return Pretrained(
        policy=policy,
        params=params,
        tokenizer=source.tokenizer,
        stop_token_ids=source.stop_token_ids,
        prompt_format=prompt_format,
        source=str(checkpoint),
    )


def _from_hugging_face(
    name, dtype, mesh, prompt_format: PromptFormat, trust_remote_code: bool, override_config
) -> Pretrained:
    policy, params = Policy.from_pretrained(name, dtype, mesh=mesh, override_config=override_config)
    config = default_config()
    config.actor_rollout_ref.model.path = str(name)
    config.actor_rollout_ref.model.trust_remote_code = trust_remote_code
    _override(config, override_config)
    source = loading.find_model(config)
    return Pretrained(
        policy, params, source.tokenizer, source.stop_token_ids, prompt_format, str(name)
    )


def _override(config, override_config: Mapping[str, Any] | None) -> None:
    """Puts further overrides over those of the config; a null takes the place of what is there."""
    model = config.actor_rollout_ref.model
    own = model.override_config.to_dict()
    with config.unlocked(), config.ignore_type():
        model.override_config = ConfigDict(
            _merged(own, override_config or {}), allow_dotted_keys=True
        )


def _merged(own: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(own)
    for key, value in further.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _take_adapters_as_trained(run: RunFolder, config) -> None:
    """Takes rank, alpha and targets from what the run noted of the adapters that it began with.

    Their folder may have others by now, or be gone.
    """
    if noted := identity.digests_in(read_json(run.config)).get(identity.ADAPTERS):
        model = config.actor_rollout_ref.model
        model.lora_adapter_path = ""
        try:
            was = json.loads(noted)
            model.lora_rank, model.lora_alpha = int(was["rank"]), float(was["alpha"])
            model.lora_target_modules = str(was["targets"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{run.config}: contents.{identity.ADAPTERS} is not what a run notes of its "
                f"adapters: {noted!a:.200}"
            ) from error


def _run_and_step(path: Path) -> tuple[RunFolder | None, str | None]:
    """The run that a path lies in and the step it names; "" for the newest; None for neither."""
    path = path.absolute()  # "." and "50" have no parents to look at
    for root, step in ((path, None), (path.parent, ""), (path.parent.parent, path.name)):
        inside = step is None or (path if step == "" else path.parent).name == "checkpoints"
        if inside and _is_run(root):
            return RunFolder(root), step
    return None, None


def _is_run(folder: Path) -> bool:
    config = RunFolder(folder).config
    try:
        return "actor_rollout_ref" in read_json(config)
    except ValueError:
        return False  # whoever reads it as a model's says what is wrong with it


def _run_config(run: RunFolder):
    """The run's config; keys that are newer than the file have their defaults."""
    config, saved = default_config(), read_json(run.config)
    _check_kinds(run.config, json.loads(config.to_json()), saved)
    with config.unlocked(), config.ignore_type():
        config.update(saved)
    # A relative path started from where the run was started.
    path, start = config.actor_rollout_ref.model.path, saved.get(identity.WORKING_DIRECTORY)
    if isinstance(start, str) and not local_path(path).exists():
        there = local_path(Path(start) / path)
        config.actor_rollout_ref.model.path = str(there) if there.is_dir() else path
    return config


def _refuse_format_with_gaps(run: RunFolder, prompt_format: PromptFormat) -> None:
    """Refuses a format that is not the one that the run trained with."""
    for key in config_files.secrets_left_out(dataclasses.asdict(prompt_format), "data"):
        raise ValueError(
            f"{key} of the run held what looks like a secret, which {run.config} leaves out, and "
            "the prompts would not be those that it trained on: put the text back in that file"
        )


def _check_kinds(path: Path, defaults: dict, saved: dict, prefix: str = "") -> None:
    """Refuses a config that was edited: a section that is none, or no text where text belongs."""
    for key in defaults.keys() & saved.keys():
        default, value = defaults[key], saved[key]
        for kind, word in ((dict, "section"), (str, "text")):
            if isinstance(default, kind) and not isinstance(value, kind):
                raise ValueError(
                    f"{path}: {prefix}{key} must be a {word}, given {value!r:.100}; put back what "
                    "the run wrote there"
                )
        if isinstance(default, dict):
            _check_kinds(path, default, value, f"{prefix}{key}.")


def _checkpoint_folder(run: RunFolder, step: str | None) -> Path:
    steps = complete_steps(run.checkpoints)
    if not steps:
        raise ValueError(f"{run.root} holds a run with neither an export nor a checkpoint")
    if not step:
        return run.checkpoints / str(steps[-1])
    if step not in map(str, steps):
        raise ValueError(f"{run.checkpoints} has the checkpoints {steps}; given {step!r}")
    return run.checkpoints / step


def _read_state(checkpoint: Path, policy: Policy) -> TrainState:
    """What a policy needs of a checkpoint, checked bit by bit; None for the rest of the state.

    The trained parameters come in the dtype and layout of the policy. Where others are frozen,
    their checksum comes too.

    Raises:
      CheckpointError: for a checkpoint that is damaged, or of another model.
      OSError: for one that cannot be read now, and may be whole.
    """
    trained, _ = lora.split(policy.abstract_params())
    checksum = jax.ShapeDtypeStruct((), "uint32") if policy.lora else None
    wanted = TrainState(None, trained, None, frozen_checksum=checksum)
    everywhere = SingleDeviceSharding(jax.local_devices()[0])
    if policy.mesh:
        everywhere = NamedSharding(policy.mesh, PartitionSpec())

    try:
        content = read_on_all(lambda: read_description(checkpoint))

        def on_disk(path, leaf):
            _, dtype = content["arrays"].get(jax.tree_util.keystr(path), (None, leaf.dtype))
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding or everywhere)

        stored = jax.tree_util.tree_map_with_path(on_disk, wanted)
        parts = (".params[", ".frozen_checksum")
        there = {name: x for name, x in content["arrays"].items() if name.startswith(parts)}
        check_arrays(checkpoint, there, stored)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            # One at a time, since those on the disk may be wider than those of the policy.
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf, like: _read_leaf(
                    checkpointer, checkpoint, path, leaf, content["digests"]
                ).astype(like.dtype),
                stored,
                wanted,
            )
    except DamagedError as error:
        step = checkpoint.name
        others = [x for x in complete_steps(checkpoint.parent) if str(x) != step]
        cure = f"load {checkpoint.parent / str(others[-1])}" if others else "the run has no other"
        raise CheckpointError(f"checkpoint {step} is damaged: {error}; {cure}") from error


def _read_leaf(checkpointer, checkpoint: Path, path, like, digests: dict[str, str]) -> jax.Array:
    """One array of a checkpoint, by its path in the state, if it is the one that was saved."""
    item = like
    for key in reversed(path):
        item = {getattr(key, "name", None) or key.key: item}
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    folder = checkpoint.resolve() / "state"
    alone = read_on_all(lambda: checkpointer.restore(folder, args=args))
    check_digests(TrainState(None, None, None).replace(**alone), digests)
    (x,) = jax.tree.leaves(alone)
    return x
