"""Finds and loads the models that a run starts from: folder, tokenizer, parameters.

These functions read the config, as those of `setup` do; the functions that they call do not.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adpo_jax.data.embedded import TASKS
from adpo_jax.devices import sharding
from adpo_jax.hf import folders
from adpo_jax.hf.config import language_config, model_config
from adpo_jax.model.lora import Lora, parse_targets
from adpo_jax.policy import adapters
from adpo_jax.policy.policy import Policy
from adpo_jax.run.whole_keys import whole_keys


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where the policy comes from.

    Attributes:
      folder: a folder with config.json, tokenizer and weights; None for the embedded model.
      hf_config: its config.json, with the overrides of model.hf_config.
      tokenizer: a Hugging Face tokenizer; None where the architecture alone was read.
      stop_token_ids: the tokens that end a completion.
      random_init: whether to start from random weights.
      generation_config: the folder's generation_config.json; empty for none.
      lora: the adapters to train; None where the weights themselves are trained.
      adapter: a folder of adapters to start from; None for new ones.
    """

    folder: Path | None
    hf_config: dict
    tokenizer: object
    stop_token_ids: tuple[int, ...]
    random_init: bool
    lora: Lora | None
    adapter: Path | None
    generation_config: dict = dataclasses.field(default_factory=dict)


def find_model(config: ConfigDict) -> ModelSource:
    """The model that `actor_rollout_ref.model` names; its weights are not read yet.

    Raises:
      ValueError: when there is no such folder, it has no tokenizer, or its parts do not fit.
    """
    model = config.actor_rollout_ref.model
    overrides = model.hf_config.to_dict()
    lora, adapter = _find_lora(model)
    if model.path in TASKS:
        if model.override_config:
            raise ValueError(
                "model.override_config changes the config.json of a folder, and "
                f"{model.path} has none; model.hf_config changes its size"
            )
        tokenizer = TASKS[model.path].make_tokenizer()
        stop = (tokenizer.eos_token_id,)
        hf_config = folders.overridden(TASKS[model.path].MODEL_CONFIG, overrides, keep_nulls=True)
        return ModelSource(
            None, hf_config, tokenizer, stop, random_init=True, lora=lora, adapter=adapter
        )
    if overrides and not model.random_init:
        raise ValueError(
            f"actor_rollout_ref.model.hf_config changes the architecture ({sorted(overrides)}), so "
            f"the weights in {model.path} no longer fit; set "
            "actor_rollout_ref.model.random_init=true or leave that empty"
        )
    folder, hf_config, generation = folders.load_folder_config(
        model.path,
        with_code=model.trust_remote_code,
        override=model.override_config.to_dict(),
    )
    resized = folders.overridden(hf_config, overrides, keep_nulls=True)
    model_config(language_config(resized))  # transformers' refusals say less
    tokenizer = _load_tokenizer(folder, hf_config, model.trust_remote_code)
    stop = _stop_token_ids(folder, tokenizer, generation, hf_config)
    return ModelSource(
        folder,
        resized,
        tokenizer,
        stop,
        random_init=model.random_init,
        lora=lora,
        adapter=adapter,
        generation_config=generation,
    )


def _find_lora(model: ConfigDict) -> tuple[Lora | None, Path | None]:
    if model.lora_adapter_path:
        folder, lora = adapters.find(model.lora_adapter_path)
        return lora, folder
    if not model.lora_rank:
        return None, None
    with whole_keys(
        {
            "the alpha of LoRA": "actor_rollout_ref.model.lora_alpha",
            "LoRA adapts": "actor_rollout_ref.model.lora_target_modules adapts",
        }
    ):
        return Lora(
            model.lora_rank, model.lora_alpha, parse_targets(model.lora_target_modules)
        ), None


@dataclasses.dataclass(frozen=True)
class FixedPolicy:
    """A model of a folder beside the policy, which never moves.

    Attributes:
      policy: the model, without parameters.
      folder: a folder with its config.json and weights; None where they are not at hand.
      override: keys of its config.json with other values.
    """

    policy: Policy
    folder: Path | None
    override: Mapping[str, Any]

    def load(self):
        """Reads the parameters, as `Policy.from_pretrained` does.

        Raises:
          ValueError: for weights that do not fit the architecture.
        """
        kwargs = {name: getattr(self.policy, name) for name in ("dtype", "param_dtype", "mesh")}
        return Policy.from_pretrained(self.folder, override_config=self.override, **kwargs)[1]

    def digest(self) -> str:
        """A digest of the files of weights and architecture, in words."""
        found = hashlib.sha256()
        for path in sorted([*self.folder.glob("*.safetensors"), self.folder / "config.json"]):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256 of files {found.hexdigest()}"


def find_fixed(config: ConfigDict, source: ModelSource, mesh: Mesh) -> dict[str, FixedPolicy]:
    """The models of "reference" and "teacher" that the config names; no weights are read yet.

    A source without a tokenizer, as `find_architecture` finds it, asks for their config.json alone.

    Raises:
      ValueError: for a folder that cannot be read, or a model of another vocabulary.
    """
    sections = {
        "reference": ("actor_rollout_ref.ref", config.actor_rollout_ref.ref),
        "teacher": ("teacher", config.teacher),
    }
    return {
        name: _fixed_policy(f"{section}.path", model, config, source, mesh)
        for name, (section, model) in sections.items()
        if model.path
    }


def _fixed_policy(
    option: str, model: ConfigDict, config: ConfigDict, source: ModelSource, mesh: Mesh
) -> FixedPolicy:
    path, override = model.path, model.override_config.to_dict()
    if path in TASKS:
        raise ValueError(
            f"{option}={path}: its weights are random before training; give the folder of a model "
            "that was trained, such as the `export` of a run"
        )
    kwargs = _policy_kwargs(config, source, mesh)
    kwargs |= {"param_dtype": kwargs["dtype"], "gradient_checkpointing": "none"}
    try:
        folder, tokenizer = None, source.tokenizer
        if not tokenizer:
            hf_config = folders.overridden(folders.find_config(path), override)
        else:
            folder, hf_config, _ = folders.load_folder_config(path, override=override)
            tokenizer = _load_tokenizer(folder, hf_config, trust_remote_code=False)
        policy = Policy.abstract_from_config(hf_config, **kwargs)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    policy = policy.for_length(longest_sequence(config))  # as the policy that it is compared with
    if tokenizer:
        _check_same_vocabulary(option, path, tokenizer, source.tokenizer)
    own = model_config(language_config(source.hf_config)).vocab_size
    if policy.config.vocab_size < own:
        raise ValueError(
            f"{option}={path}: it embeds {policy.config.vocab_size} tokens and the policy {own}, "
            "so the policy could write tokens that it does not know; choose a model of the same "
            "family"
        )
    return FixedPolicy(policy, folder, override)


def _check_same_vocabulary(option: str, path: str, other, own) -> None:
    """Refuses a tokenizer that gives a token another number, or has other tokens."""
    ours, theirs = own.get_vocab(), other.get_vocab()
    different = sorted(ours.items() ^ theirs.items(), key=lambda pair: (pair[1], pair[0]))
    if not different:
        return
    token, number = different[0]
    have, have_not = ("policy", "other") if ours.get(token) == number else ("other", "policy")
    raise ValueError(
        f"{option}={path}: its tokenizer has {len(theirs)} tokens, the policy's {len(ours)}, and "
        f"{len(different)} entries differ: number {number} is {token!a:.60} in the {have}'s alone, "
        f"not in the {have_not}'s. Token by token they are compared by numbers, so both need the "
        "same vocabulary: choose a model of the policy's family"
    )


def find_architecture(config: ConfigDict) -> ModelSource:
    """The model's config.json alone, without tokenizer and weights.

    Raises:
      ValueError: when there is none.
    """
    model = config.actor_rollout_ref.model
    if model.path in TASKS:
        return find_model(config)
    hf_config = folders.find_config(model.path)
    hf_config = folders.overridden(hf_config, model.override_config.to_dict())
    hf_config = folders.overridden(hf_config, model.hf_config.to_dict(), keep_nulls=True)
    lora, adapter = _find_lora(model)
    return ModelSource(
        None,
        hf_config,
        tokenizer=None,
        stop_token_ids=(0,),
        random_init=True,
        lora=lora,
        adapter=adapter,
    )


def _load_tokenizer(folder: Path, hf_config: dict, trust_remote_code: bool):
    from transformers import AutoConfig, AutoTokenizer

    if not any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        raise ValueError(f"no tokenizer can be read from {folder}: it has no tokenizer.json")
    if trust_remote_code:
        print(
            f"WARNING: actor_rollout_ref.model.trust_remote_code: Python code in {folder} may run, "
            "with your rights",
            file=sys.stderr,
            flush=True,
        )
    elif _is_code_of_its_own(folder):
        raise ValueError(
            f"the tokenizer of {folder} is Python code in that folder, which is not run; read it, "
            "then set actor_rollout_ref.model.trust_remote_code=true"
        )
    try:
        settings = {"trust_remote_code": trust_remote_code}
        if not trust_remote_code:
            # Otherwise transformers reads the folder's config.json, whose errors do not concern the
            # tokenizer and whose overrides it does not know.
            named = hf_config.get("tokenizer_class")
            settings["config"] = AutoConfig.for_model(
                hf_config["model_type"], name_or_path=str(folder)
            )
            settings["config"].tokenizer_class = named if isinstance(named, str) else None
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        tokenizer.decode(tokenizer("1 + 1 = 2\n")["input_ids"])
        ends = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        bad = [name for name, x in ends.items() if x is not None and type(x) is not int]
        if bad:
            raise ValueError(f"its {bad[0]} token is no token of the vocabulary")
        return tokenizer
    except BaseException as error:  # tokenizers raises bare exceptions, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"no tokenizer can be read from {folder}: {reason}") from error


def _is_code_of_its_own(folder: Path) -> bool:
    """Whether the tokenizer's class is in the folder and not in transformers.

    transformers might read such a folder as another tokenizer.
    """
    import transformers

    path = folder / "tokenizer_config.json"
    settings = folders.read_json(path) if path.exists() else {}
    name, auto_map = settings.get("tokenizer_class"), settings.get("auto_map")
    its_own = isinstance(auto_map, dict) and "AutoTokenizer" in auto_map
    return its_own and isinstance(name, str) and bool(name) and not hasattr(transformers, name)


def _stop_token_ids(folder: Path, tokenizer, generation: dict, hf_config: dict) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence token and all those of generation_config.json.

    Where that file names none, those of config.json are taken, as transformers does.
    """
    named = _ends(generation, folder / "generation_config.json")
    if not named:
        inner = hf_config.get("text_config")
        named = _ends(hf_config, folder / "config.json")
        named = named or _ends(inner if isinstance(inner, dict) else {}, folder / "config.json")
    ids = {tokenizer.eos_token_id, *named} - {None}
    if not ids:
        raise ValueError(
            f"the tokenizer of {folder} has no end-of-sequence token, so no completion would end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(ids))


def _ends(content: dict, path: Path) -> list[int]:
    """The tokens under `eos_token_id`, which may be one or a list."""
    given = content.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(x) is int and 0 <= x < 1 << 31 for x in ids):
        raise ValueError(
            f"{path}: eos_token_id is a token id or a list of them; given {given!r:.80}"
        )
    return ids


def make_policy(config: ConfigDict, source: ModelSource, mesh: Mesh) -> Policy:
    """The policy, without parameters.

    Raises:
      ValueError: for an architecture that is not supported, or a tokenizer of another model.
    """
    policy = Policy.abstract_from_config(source.hf_config, **_policy_kwargs(config, source, mesh))
    policy = policy.for_length(longest_sequence(config))
    experts = sharding.mesh_axis_size(mesh, "expert") if mesh else 1
    if experts > 1 and not policy.config.mixture:
        raise ValueError(
            f"mesh.expert is {experts}, but the model has no experts; give its devices to mesh.fsdp"
        )
    _tell_of_positions(policy, longest_sequence(config))
    if source.tokenizer is not None:
        _check_vocabulary(source, policy.config.vocab_size)
    actor = config.actor_rollout_ref.actor
    with whole_keys({"attention": "actor_rollout_ref.actor.attention"}):
        return dataclasses.replace(
            policy,
            lora=source.lora,
            attention=actor.attention,
            sequence_exchange=actor.sequence_exchange,
        )


def longest_sequence(config: ConfigDict) -> int:
    """Tokens of the longest prompt and the longest completion together."""
    completion = max(config.data.max_response_length, config.eval.max_tokens)
    return config.data.max_prompt_length + completion


def _tell_of_positions(policy: Policy, longest: int) -> None:
    """Says so where sequences may be longer than those that the model is made for.

    No family has a table of positions that would end there, so training goes on, as elsewhere.
    """
    positions = policy.positions or longest
    if longest > positions and jax.process_index() == 0:
        logging.warning(
            "a prompt and its completion may have %d tokens together, and the model is made for %d "
            "positions (max_position_embeddings): lower data.max_prompt_length, "
            "data.max_response_length or eval.max_tokens, or change the model's positions by "
            "actor_rollout_ref.model.override_config",
            longest,
            positions,
        )


def _check_vocabulary(source: ModelSource, num_embedded: int) -> None:
    """Refuses a tokenizer whose ordinary tokens, or whose ends, the model does not embed.

    An added token beyond (as `<image_soft_token>` of Gemma 3's text models) does no harm as long as
    no prompt has it, which `check_embedded` makes sure of.
    """
    words = source.tokenizer.vocab_size
    if words > num_embedded:
        raise ValueError(
            f"the tokenizer has {words} tokens, the model embeds {num_embedded}: they do not "
            "belong together"
        )
    beyond = [x for x in source.stop_token_ids if x >= num_embedded]
    if beyond:
        raise ValueError(
            f"a completion is to end with token {beyond[0]}, and the model embeds {num_embedded} "
            "tokens, so it can never be sampled: tokenizer and model do not belong together"
        )


def check_embedded(policy: Policy, token_ids: Sequence[Sequence[int]], what: str) -> None:
    """Refuses token ids that the model has no embedding for.

    Args:
      what: what the rows of token ids are, for the error, as in "prompt".
    """
    num_embedded = policy.config.vocab_size
    for row, ids in enumerate(token_ids):
        if max(ids, default=0) >= num_embedded:
            raise ValueError(
                f"{what} {row + 1} has token {max(ids)}, and the model embeds {num_embedded} "
                "tokens: leave out what becomes that token, or use the model's own tokenizer"
            )


def initial_params(config: ConfigDict, source: ModelSource, mesh: Mesh):
    """The parameters that a fresh run starts from.

    Raises:
      ValueError: for weights that do not fit the architecture.
    """
    kwargs = _policy_kwargs(config, source, mesh)
    key = jax.random.key(config.trainer.seed)
    if source.random_init:
        policy, params = Policy.from_config(source.hf_config, key, **kwargs)
    else:
        override = config.actor_rollout_ref.model.override_config.to_dict()
        policy, params = Policy.from_pretrained(source.folder, override_config=override, **kwargs)
        if source.lora:
            _tell_of_rounding(source.folder, kwargs["param_dtype"])
    if source.adapter:
        return adapters.load(policy, params, source.adapter)[1]
    if source.lora:
        return policy.with_adapters(params, source.lora, key)[1]
    return params


def _tell_of_rounding(folder: Path, dtype) -> None:
    """Says so where adapters are trained beside weights that are wider in their folder."""
    if jnp.dtype(dtype) == jnp.float32:
        return
    wide = folders.dtypes(folder) & {"F32"}
    if wide and jax.process_index() == 0:
        logging.warning(
            "the weights in %s are float32, and the frozen ones are held in bfloat16: the adapters "
            "are trained beside the rounded weights, and an export merges them into those; "
            "trainer.bf16=false keeps float32",
            folder,
        )


def _policy_kwargs(config: ConfigDict, source: ModelSource, mesh: Mesh) -> dict:
    dtype = jnp.bfloat16 if config.trainer.bf16 else jnp.float32
    return {
        "dtype": dtype,
        # Frozen weights never change, so they need not be wider than the computation.
        "param_dtype": dtype if source.lora else jnp.float32,
        "mesh": mesh,
        "gradient_checkpointing": config.trainer.gradient_checkpointing,
        "scan_layers": config.trainer.scan_layers,
    }
